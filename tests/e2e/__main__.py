"""All tests with real servers, in two halves side by side: much of a server's start, and of its end, is waiting.

    python -m tests.e2e -m "not gpu"

Arguments are pytest's, for both halves; each line that a half says bears its name. Ends with 0 if both halves do, and
only when both have. Invariant: a new file is in one of the halves by itself.
"""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
OWNED = sorted(str(path) for path in FOLDER.glob("test_verl_*.py"))
HALVES = {
    "verl": OWNED,
    "servers": [str(FOLDER), *(f"--ignore={path}" for path in OWNED)],
}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code. Ctrl-C reaches the halves by themselves, and their ends are awaited."""
    with ThreadPoolExecutor(len(HALVES)) as threads:
        ended = [threads.submit(run, half, [*which, *arguments]) for half, which in HALVES.items()]
    codes = {half: future.result() for half, future in zip(HALVES, ended, strict=True)}
    print(*(f"{half} ended with {code}" for half, code in codes.items()), sep=", ")
    return 1 if any(codes.values()) else 0


def run(half: str, arguments: Sequence[str]) -> int:
    """One half's pytest."""
    command = [sys.executable, "-m", "pytest", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            sys.stdout.write(f"{half:>7} | {line}")
            sys.stdout.flush()
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
