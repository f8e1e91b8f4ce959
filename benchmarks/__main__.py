"""``python -m benchmarks sync | control | manifest | broadcast | fleet | report | plot | check``.

Exit codes: 0; 1 where ``check`` finds a target missed, or a benchmark could not be run; 2 for wrong usage.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adapter.errors import WeightSyncError
from benchmarks.shapes import MODELS

EXIT_MISSED, EXIT_USAGE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except ValueError as error:
        return _said(error, EXIT_USAGE)
    except (WeightSyncError, RuntimeError) as error:
        return _said(error, EXIT_MISSED)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What a weight sync costs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_sync(commands.add_parser("sync", help="every way of updating one model on one real server"))
    control = commands.add_parser("control", help="what gRPC and the sidecar add, against gather_object; on the CPU")
    control.add_argument("--ranks", default="1,8,32", help="numbers of ranks, with commas between (default 1,8,32)")
    control.add_argument("--tensors", default="10,1000,10000", help="sizes of manifests (default 10,1000,10000)")
    control.set_defaults(run=_control)
    manifest = commands.add_parser("manifest", help="the first update of a large manifest; on the CPU")
    manifest.add_argument("--tensors", type=int, default=20000)
    manifest.set_defaults(run=_manifest)
    broadcast = commands.add_parser("broadcast", help="over torch.distributed, against a bare broadcast")
    broadcast.add_argument("--model", choices=MODELS, required=True)
    broadcast.add_argument("--tp", type=int, default=1)
    broadcast.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    broadcast.add_argument("--bucket-bytes", default="1073741824,4294967296", help="sizes, with commas between")
    broadcast.set_defaults(run=_broadcast)
    fleet = commands.add_parser("fleet", help="the control of a fleet's update, by the number of engines; on the CPU")
    fleet.add_argument("--engines", default="1,4,16,64,256", help="with commas between (default 1,4,16,64,256)")
    slow_help = (
        "rows with a slow engine: among how many, and milliseconds of each of its loads (default 16:100,256:2000)"
    )
    fleet.add_argument("--slow", default="16:100,256:2000", help=slow_help)
    fleet.set_defaults(run=_fleet)
    for command in (control, manifest, broadcast, fleet):
        command.add_argument("--out", type=Path, default=Path("bench"), help="folder for samples (default ./bench)")
        command.add_argument("--repeats", type=int, default=7)
    for name, help_, run in (
        ("report", "print the tables of a folder", _report),
        ("plot", "draw what a folder has", _plot),
        ("check", "compare what a folder has with the targets", _check),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("folder", type=Path)
        command.set_defaults(run=run)
    return parser


def _add_sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--ways", default="all", help='names or groups (floor, peers, stock, replay), with commas; "all"'
    )
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for samples and logs (default ./bench)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-ups", type=int, default=3, help="three at least for replay: it records, then proves")
    parser.add_argument("--no-bytes", action="store_true", help="do not count bytes after the timed updates")
    parser.add_argument("--limit-s", type=float, default=540.0, help="begin no way later than this (default 540)")
    parser.set_defaults(run=_sync)


def _sync(options: argparse.Namespace) -> int:
    from benchmarks.sync.run import Options, run
    from benchmarks.sync.ways import chosen

    run(
        Options(
            model=options.model,
            tp_size=options.tp,
            device=options.device,
            ways=tuple(chosen(options.ways, options.device)),
            out=options.out / f"{options.model}-tp{options.tp}",
            repeats=options.repeats,
            warm_ups=options.warm_ups,
            count_bytes=not options.no_bytes,
            limit_s=options.limit_s,
        )
    )
    return 0


def _control(options: argparse.Namespace) -> int:
    from benchmarks.control.run import run

    run(_numbers(options.ranks), _numbers(options.tensors), options.out, options.repeats)
    return 0


def _manifest(options: argparse.Namespace) -> int:
    from benchmarks.manifest import run

    run(options.tensors, options.out, options.repeats)
    return 0


def _broadcast(options: argparse.Namespace) -> int:
    from benchmarks.broadcast import Options, run

    run(
        Options(
            model=options.model,
            tp_size=options.tp,
            device=options.device,
            bucket_bytes=tuple(_numbers(options.bucket_bytes)),
            out=options.out / f"broadcast-{options.model}-tp{options.tp}",
            repeats=options.repeats,
        )
    )
    return 0


def _fleet(options: argparse.Namespace) -> int:
    from benchmarks.fleet.run import Options, run

    slow = [pair.split(":") for pair in options.slow.split(",") if pair]
    run(
        Options(
            engines=tuple(_numbers(options.engines)),
            out=options.out,
            repeats=options.repeats,
            slow={int(among): float(slow_ms) for among, slow_ms in slow},
        )
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks import report

    print(report.text(options.folder))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from benchmarks.plot import draw

    print(draw(options.folder))
    return 0


def _check(options: argparse.Namespace) -> int:
    from benchmarks.check import judged

    said, missed = judged(options.folder)
    print(said)
    return EXIT_MISSED if missed else 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _said(error: Exception, code: int) -> int:
    print(f"benchmarks: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
