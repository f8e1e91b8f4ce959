"""The command line: ``sglang-weight-sync serve | doctor | health | status | demo``.

Exit codes: 0 clean; 1 not healthy, or a forced stop; 2 wrong usage; 3 ``serve`` could not start.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sidecar import __version__, channels, settings
from sidecar.config import (
    AccessRules,
    EngineKeys,
    Limits,
    ServeConfig,
    TcpAddress,
    Timeouts,
    TlsFiles,
    default_listen,
    parse_address,
)

EXIT_NOT_HEALTHY, EXIT_USAGE, EXIT_CANNOT_START = 1, 2, 3
REEXECUTED = "SGLANG_WEIGHT_SYNC_REEXECUTED"
# Set by SGLang for itself; prometheus_client would add this process's metrics to the engine's.
MULTIPROCESS_METRICS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


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
    from sidecar.doctor import command as doctor_flags

    parser = argparse.ArgumentParser(prog="sglang-weight-sync", description="Freshly trained weights into SGLang.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the sidecar beside an SGLang server", allow_abbrev=False)
    settings.add_flags(serve)
    serve.set_defaults(run=_serve)
    doctor = commands.add_parser(
        "doctor", help="tell whether weight sync will work here, before the first crash", allow_abbrev=False
    )
    doctor_flags.add_arguments(doctor)
    doctor.set_defaults(run=_doctor)
    health = commands.add_parser("health", help="exit 0 if the sidecar is ready to update its engine, else 1")
    health.add_argument("--liveness", action="store_true", help="ask only whether the process lives")
    health.set_defaults(run=_health)
    status = commands.add_parser("status", help="print what the sidecar is doing, and for whom it waits")
    status.add_argument(
        "--watch", type=float, nargs="?", const=1.0, metavar="SECONDS", help="go on, and look every second (or as said)"
    )
    status.set_defaults(run=_status)
    for command in (health, status):
        channels.add_arguments(command, os.environ)
    demo = commands.add_parser("demo", help="a real server, this sidecar and two trainer processes", add_help=False)
    demo.add_argument("arguments", nargs=argparse.REMAINDER)
    demo.set_defaults(run=_demo)
    return parser


def _serve(options: argparse.Namespace) -> int:
    for name in MULTIPROCESS_METRICS:  # before prometheus_client is imported
        os.environ.pop(name, None)
    from sidecar import logs
    from sidecar.listening import AddressInUseError, private_umask
    from sidecar.server import serve

    private_umask()
    try:
        values = settings.resolve(options, os.environ)
        config = _serve_config(values)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    logs.configure(values["log-level"], logs.LogForm(values["log-format"]))
    try:
        clean = serve(config)
    except (AddressInUseError, OSError, ValueError) as error:
        return _fail(str(error), EXIT_CANNOT_START)
    return 0 if clean else _leave_at_once()


def _leave_at_once() -> NoReturn:
    """End without waiting for the thread of a call that the engine may never answer."""
    logging.shutdown()
    os._exit(EXIT_NOT_HEALTHY)


def _serve_config(values: dict[str, Any]) -> ServeConfig:
    from sidecar.engine.gpus import parse_uuids

    if not values["engine-url"]:
        raise ValueError("--engine-url is missing: the SGLang server, such as http://127.0.0.1:30000")
    phases = {name: values[f"{name}-timeout"] for name in Timeouts.__dataclass_fields__}
    limits = {name: values["max-" + name.replace("_", "-")] for name in Limits.__dataclass_fields__}
    return ServeConfig(
        engine_url=values["engine-url"],
        listen=parse_address(values["listen"] or default_listen()),
        http_listen=_tcp(values["http-listen"]),
        engine_keys=EngineKeys(api=values["engine-api-key"], admin=values["engine-admin-key"]),
        tls=_tls(values),
        access=AccessRules(
            update_token=values["update-token"],
            look_token=values["look-token"],
            update_clients=values["update-clients"],
        ),
        insecure=values["insecure"],
        gpu_uuids=parse_uuids(",".join(values["gpu-uuids"])),
        timeouts=Timeouts(**phases),
        limits=Limits(**limits),
        accept_checkpoint=values["accept-checkpoint-weights"],
        require_update=values["require-update"],
        replay=values["replay"],
        drain_s=values["drain-timeout"],
        lame_duck_s=values["lame-duck"],
        journal_path=values["journal"],
    )


def _tcp(text: str) -> TcpAddress | None:
    address = parse_address(text) if text else None
    if address is not None and not isinstance(address, TcpAddress):
        raise ValueError(f"--http-listen {text}: plain HTTP needs host:port")
    return address


def _tls(values: dict[str, Any]) -> TlsFiles | None:
    certificate, key, client_ca = values["tls-certificate"], values["tls-key"], values["tls-client-ca"]
    if not (certificate or key or client_ca):
        return None
    if not (certificate and key):
        raise ValueError("TLS needs both --tls-certificate and --tls-key")
    return TlsFiles(certificate=certificate, key=key, client_ca=client_ca)


def _doctor(options: argparse.Namespace) -> int:
    from sidecar.doctor import command

    return command.main(options)


def _health(options: argparse.Namespace) -> int:
    from sidecar.inspect import is_serving

    try:
        connect, target = channels.connector(options, os.environ), channels.target_of(options)
        serving, why = is_serving(target, liveness=options.liveness, timeout_s=options.timeout, connect=connect)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    print("SERVING" if serving else f"NOT_SERVING: {why}")  # noqa: T201 - the command's output
    return 0 if serving else EXIT_NOT_HEALTHY


def _status(options: argparse.Namespace) -> int:
    from sidecar import inspect

    try:
        connect, target = channels.connector(options, os.environ), channels.target_of(options)
        if options.watch is not None:
            return inspect.watch(target, interval_s=options.watch, timeout_s=options.timeout, connect=connect)
        reached, text = inspect.status_text(target, timeout_s=options.timeout, connect=connect)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    print(text)  # noqa: T201 - the command's output
    return 0 if reached else EXIT_NOT_HEALTHY


def _demo(options: argparse.Namespace) -> int:
    """The demo lives with the trainer's code, which this process does not import."""
    command = [sys.executable, "-m", "adapter.demo", *options.arguments]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter and our own arguments


def _fail(message: str, code: int) -> int:
    print(f"sglang-weight-sync: {message}", file=sys.stderr)  # noqa: T201 - usage and startup errors
    return code
