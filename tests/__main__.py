"""All tests that CI runs, in lanes side by side: much of what a server takes to start and to end is waiting.

    python -m tests -m "not gpu"

Arguments are pytest's, for every lane; each line that a lane says bears its name. Ends with 0 if all lanes do, and only
when all have. Invariant: a new file is in one of the lanes by itself.
"""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
SERVERS, NETWORKS = TESTS / "e2e", TESTS / "fleet"
OWNERS = [str(path) for name in ("verl_*", "ray_*", "torchrun_*") for path in sorted(SERVERS.glob(f"test_{name}.py"))]
"""Half of the time that servers take: those of trainers that own theirs. Of the others most share a few."""
LANES = {
    "no server": [str(TESTS), f"--ignore={SERVERS}", f"--ignore={NETWORKS}"],
    "servers": [str(SERVERS), *(f"--ignore={path}" for path in OWNERS)],
    "owners": OWNERS,
}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code. Ctrl-C reaches the lanes by themselves, and their ends are awaited."""
    with ThreadPoolExecutor(len(LANES)) as threads:
        ended = [threads.submit(run, lane, [*which, *arguments]) for lane, which in LANES.items()]
    codes = {lane: future.result() for lane, future in zip(LANES, ended, strict=True)}
    print(*(f"{lane}: ended with {code}" for lane, code in codes.items()), sep=", ")
    return 1 if any(codes.values()) else 0


def run(lane: str, arguments: Sequence[str]) -> int:
    """One lane's pytest."""
    command = [sys.executable, "-m", "pytest", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            sys.stdout.write(f"{lane:>9} | {line}")
            sys.stdout.flush()
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
