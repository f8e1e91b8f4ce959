"""All tests that CI runs, in lanes side by side: much of what a server takes to start and to end is waiting.

    python -m tests -m "not gpu"

Arguments are pytest's, for every lane; each line that a lane says bears its name. Ends with 0 if all lanes do, and only
when all have. Invariant: a new file is in one of the lanes by itself.

Lanes take the cores from each other, and a test that fails may have met no more than that. So where at most ``FEW``
failed, these run again when all lanes have ended, once and alone, as CPython's ``regrtest --rerun`` does it. One that
passes then is named as flaky in the last lines and wants to be mended; one that fails again fails the run. Not with
``-x`` and its like, after which nobody knows what the rest would have done.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SERVERS, NETWORKS = TESTS / "e2e", TESTS / "fleet"
OWNERS = [str(path) for name in ("verl_*", "ray_*", "torchrun_*") for path in sorted(SERVERS.glob(f"test_{name}.py"))]
"""Half of the time that servers take: those of trainers that own theirs. Of the others most share a few."""
LANES = {
    "no server": [str(TESTS), f"--ignore={SERVERS}", f"--ignore={NETWORKS}"],
    "servers": [str(SERVERS), *(f"--ignore={path}" for path in OWNERS)],
    "owners": OWNERS,
}
CACHES = TESTS.parent / ".pytest_cache" / "lanes"
FEW = 3
STOPS_EARLY = ("-x", "--exitfirst", "--maxfail")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code. Ctrl-C reaches the lanes by themselves, and their ends are awaited."""
    with ThreadPoolExecutor(len(LANES)) as threads:
        ended = [threads.submit(run, lane, [*arguments, "--cache-clear"]) for lane in LANES]
    codes = {lane: future.result() for lane, future in zip(LANES, ended, strict=True)}
    if any(argument.startswith(STOPS_EARLY) for argument in arguments):
        return ended_with(codes)  # some were not run at all
    failed = {lane: failed_tests(lane) for lane, code in codes.items() if code == pytest.ExitCode.TESTS_FAILED}
    if 0 < sum(map(len, failed.values())) <= FEW:
        for lane in failed:
            codes[lane] = run(lane, [*arguments, "--last-failed"])
            for test in sorted(set(failed[lane]) - set(failed_tests(lane))):
                print(f"FLAKY, failed beside others and not alone: {test}")
    return ended_with(codes)


def ended_with(codes: Mapping[str, int]) -> int:
    """Say so; the exit code of all."""
    print(*(f"{lane}: ended with {code}" for lane, code in codes.items()), sep=", ")
    return 1 if any(codes.values()) else 0


def run(lane: str, arguments: Sequence[str]) -> int:
    """One lane's pytest."""
    command = [sys.executable, "-m", "pytest", *LANES[lane], "-o", f"cache_dir={cache(lane)}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            sys.stdout.write(f"{lane:>9} | {line}")
            sys.stdout.flush()
    return tests.returncode


def failed_tests(lane: str) -> list[str]:
    """Those of its last run, or its last run again, that failed or could not be set up."""
    kept = cache(lane) / "v" / "cache" / "lastfailed"
    return list(json.loads(kept.read_text())) if kept.exists() else []


def cache(lane: str) -> Path:
    """Where pytest keeps which tests of this lane failed."""
    return CACHES / lane.replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
