"""The command line of the doctor: its flags, the engine's keys, what it prints and its exit code.

Invariant: keys come from files or from the environment, never from an argument, which every user of the host can read.
"""

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

from sidecar.doctor import report
from sidecar.doctor.finding import Verdict
from sidecar.doctor.host import Host
from sidecar.doctor.run import examine
from sidecar.doctor.situation import DEFAULT_TIMEOUT_S, DoctorOptions
from sidecar.engine.gpus import parse_uuids

EXIT_FAIL, EXIT_USAGE = 1, 2
API_KEY = "SGLANG_WEIGHT_SYNC_ENGINE_API_KEY"
ADMIN_KEY = "SGLANG_WEIGHT_SYNC_ENGINE_ADMIN_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``doctor``."""
    parser.add_argument("--engine-url", required=True, help="the SGLang server, such as http://127.0.0.1:30000")
    parser.add_argument("--listen", default="", help="where a sidecar is to serve: unix:/path.sock, or host:port")
    parser.add_argument("--target", default="", help="where a sidecar serves already")
    parser.add_argument("--ranks", type=int, help="TP ranks of the trainer")
    parser.add_argument(
        "--gpu-uuids", default="", metavar="GPU-a,GPU-b,...", help="the engine's GPUs, one per TP rank, as for serve"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, help="seconds for each look (default 5)")
    parser.add_argument("--engine-api-key-file", type=Path, help=f"file with the engine's --api-key (or ${API_KEY})")
    parser.add_argument(
        "--engine-admin-key-file", type=Path, help=f"file with the engine's --admin-api-key (or ${ADMIN_KEY})"
    )


def main(options: argparse.Namespace, host: Host | None = None) -> int:
    """Look, print, and return 0 if nothing fails, 1 if something does, 2 for wrong usage."""
    host = host or Host.here()
    try:
        asked = _asked(options, host.environ)
    except (OSError, ValueError) as error:
        print(f"sglang-weight-sync: {error}", file=sys.stderr)  # noqa: T201 - usage errors
        return EXIT_USAGE
    findings = asyncio.run(examine(asked, host))
    print(report.as_json(findings) if options.json else report.as_text(findings))  # noqa: T201 - the command's output
    return EXIT_FAIL if report.worst(findings) is Verdict.FAIL else 0


def _asked(options: argparse.Namespace, environ: Mapping[str, str]) -> DoctorOptions:
    return DoctorOptions(
        engine_url=options.engine_url,
        listen=options.listen,
        target=options.target,
        ranks=options.ranks,
        gpu_uuids=parse_uuids(options.gpu_uuids),
        timeout_s=options.timeout,
        api_key=_key(options.engine_api_key_file, environ.get(API_KEY, "")),
        admin_key=_key(options.engine_admin_key_file, environ.get(ADMIN_KEY, "")),
    )


def _key(file: Path | None, otherwise: str) -> str:
    """The file's, if one was given."""
    return (file.read_text() if file else otherwise).strip()
