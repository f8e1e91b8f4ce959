"""The command line: ``sglang-weight-sync serve | health | status | demo``.

Exit codes: 0 clean; 1 not healthy, or a forced stop; 2 wrong usage; 3 ``serve`` could not start.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sidecar import __version__
from sidecar.config import ServeConfig, Timeouts, parse_address

EXIT_NOT_HEALTHY, EXIT_USAGE, EXIT_CANNOT_START = 1, 2, 3
REEXECUTED = "SGLANG_WEIGHT_SYNC_REEXECUTED"
# Set by SGLang for itself; prometheus_client would add this process's metrics to the engine's.
MULTIPROCESS_METRICS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Called by the console script, ``python -m sidecar``, and SGLang's --sidecar."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"] and "torch" in sys.modules and REEXECUTED not in os.environ:
        _become_light(arguments)
    options = _parser().parse_args(arguments)
    command: int = options.run(options)
    return command


def _become_light(arguments: Sequence[str]) -> None:
    """Replace this process by a small one of the same pid and parent.

    The child that SGLang starts for --sidecar has torch and SGLang imported: 810 MB that the sidecar never needs.
    """
    home = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    os.execve(  # noqa: S606 - our own interpreter and our own arguments
        sys.executable,
        [sys.executable, "-m", "sidecar", *arguments],
        {**os.environ, "PYTHONPATH": path, REEXECUTED: "1"},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang-weight-sync", description="Freshly trained weights into SGLang.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="run the sidecar beside an SGLang server"))
    health = commands.add_parser("health", help="exit 0 if the sidecar is ready to update its engine, else 1")
    health.add_argument("--liveness", action="store_true", help="ask only whether the process lives")
    health.set_defaults(run=_health)
    status = commands.add_parser("status", help="print what the sidecar is doing, and for whom it waits")
    status.set_defaults(run=_status)
    for command in (health, status):
        command.add_argument("--target", required=True, help="unix:/path.sock or host:port of the sidecar")
        command.add_argument("--timeout", type=float, default=5.0, help="seconds (default 5)")
    demo = commands.add_parser("demo", help="a real server, this sidecar and two trainer processes", add_help=False)
    demo.add_argument("arguments", nargs=argparse.REMAINDER)
    demo.set_defaults(run=_demo)
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    defaults = Timeouts()
    parser.add_argument("--engine-url", required=True, help="the SGLang server, such as http://127.0.0.1:30000")
    parser.add_argument("--listen", required=True, help="unix:/path.sock, or host:port (port 0: any)")
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="let --listen be an address that other hosts reach: there is no TLS, and whoever reaches it may change "
        "the weights",
    )
    parser.add_argument(
        "--gpu-uuids",
        default="",
        metavar="GPU-a,GPU-b,...",
        help="the engine's GPUs, one per TP rank (default: found out where this host shows them)",
    )
    parser.add_argument(
        "--no-replay",
        dest="replay",
        action="store_false",
        help="have the model load every update itself, also where the engine has the replay loader",
    )
    parser.add_argument("--drain-timeout", type=float, default=30.0, help="seconds for the update in hand at SIGTERM")
    parser.add_argument(
        "--accept-checkpoint-weights",
        action="store_true",
        help="an engine that was restarted is ready with its checkpoint, before its first update",
    )
    parser.add_argument(
        "--journal",
        type=Path,
        help="file that says an update is being applied, for the successor of a killed sidecar "
        "(default: SOCKET.journal; on TCP: none)",
    )
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics on this loopback port")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    for name in defaults.__dataclass_fields__:
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name}-timeout", type=float, default=value, help=f"seconds for phase {name} (default {value:g})"
        )
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    for name in MULTIPROCESS_METRICS:  # before prometheus_client is imported
        os.environ.pop(name, None)
    from sidecar.listening import AddressInUseError, private_umask
    from sidecar.server import serve

    logging.basicConfig(level=options.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    try:
        config = _serve_config(options)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    private_umask()
    try:
        clean = serve(config)
    except (AddressInUseError, OSError) as error:
        return _fail(str(error), EXIT_CANNOT_START)
    return 0 if clean else _leave_at_once()


def _leave_at_once() -> NoReturn:
    """End without waiting for the thread of a call that the engine may never answer."""
    logging.shutdown()
    os._exit(EXIT_NOT_HEALTHY)


def _serve_config(options: argparse.Namespace) -> ServeConfig:
    from sidecar.engine.gpus import parse_uuids

    phases = {name: getattr(options, f"{name}_timeout") for name in Timeouts.__dataclass_fields__}
    return ServeConfig(
        engine_url=options.engine_url,
        listen=parse_address(options.listen),
        insecure=options.insecure,
        gpu_uuids=parse_uuids(options.gpu_uuids),
        timeouts=Timeouts(**phases),
        accept_checkpoint=options.accept_checkpoint_weights,
        replay=options.replay,
        drain_s=options.drain_timeout,
        metrics_port=options.metrics_port,
        journal_path=options.journal,
    )


def _health(options: argparse.Namespace) -> int:
    from sidecar.inspect import is_serving

    serving, why = is_serving(options.target, liveness=options.liveness, timeout_s=options.timeout)
    print("SERVING" if serving else f"NOT_SERVING: {why}")  # noqa: T201 - the command's output
    return 0 if serving else EXIT_NOT_HEALTHY


def _status(options: argparse.Namespace) -> int:
    from sidecar.inspect import status_text

    reached, text = status_text(options.target, timeout_s=options.timeout)
    print(text)  # noqa: T201 - the command's output
    return 0 if reached else EXIT_NOT_HEALTHY


def _demo(options: argparse.Namespace) -> int:
    """The demo lives with the trainer's code, which this process does not import."""
    command = [sys.executable, "-m", "adapter.demo", *options.arguments]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter and our own arguments


def _fail(message: str, code: int) -> int:
    print(f"sglang-weight-sync: {message}", file=sys.stderr)  # noqa: T201 - usage and startup errors
    return code
