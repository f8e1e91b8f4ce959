"""The scripted engine in a process of its own, so that it shares no interpreter lock with who measures.

    python -m benchmarks.control.engine TP_SIZE

Prints its address and serves until standard input ends. Needs neither torch nor SGLang.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.fakes import ScriptedEngine

RELEASE = "0.5.23"
_END_S = 10.0


@contextmanager
def scripted_engine(tp_size: int) -> Iterator[str]:
    """One in a child process; its address."""
    command = [sys.executable, "-m", "benchmarks.control.engine", str(tp_size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the scripted engine did not start")
            yield url
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """Serve."""
    with ScriptedEngine(RELEASE, int(sys.argv[1])) as engine:
        print(engine.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
