"""`python -m adapter.demo`: exits 0 if everything that it claims held, else 1.

Logs lie in a temporary folder that is removed after a success, and kept and named after a failure.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from adapter.demo.engine_http import EngineAnswerError
from adapter.demo.report import Report
from adapter.demo.story import tell
from adapter.errors import WeightSyncError


def main() -> int:
    """Tells the story; the exit code."""
    argparse.ArgumentParser(prog="python -m adapter.demo", description=__doc__).parse_args()
    signal.signal(signal.SIGTERM, _leave)
    # Short: a Unix socket's path may have 107 bytes.
    workdir = Path(tempfile.mkdtemp(prefix="weight-sync-"))
    started = time.monotonic()
    all_well = False
    try:
        all_well = _told_well(workdir)
    except KeyboardInterrupt:
        print("\ninterrupted; everything that was started is ended")
        return 130
    finally:
        _leave_logs(workdir, all_well)
    print(f"The whole demo took {time.monotonic() - started:.0f} s.")
    return 0 if all_well else 1


def _told_well(workdir: Path) -> bool:
    report = Report()
    try:
        tell(workdir, report)
    except (WeightSyncError, EngineAnswerError, OSError) as error:
        print(f"\nThe demo broke off: {error}", flush=True)
        return False
    return report.verdict()


def _leave_logs(workdir: Path, all_well: bool) -> None:
    if all_well:
        shutil.rmtree(workdir)
    else:
        print(f"The logs are in {workdir}.", flush=True)


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM ends the demo like an exception, so that whatever it started is stopped."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
