"""The engines' and sidecars' processes, as few as there are cores for twice.

Invariant: when the block ends, every process has ended.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet.host import SERVING

PROCESSES = 4
END_S = 30.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """One engine that takes longer to load."""

    name: str
    seconds: float
    """For every bucket."""


NOBODY = Slow(name="", seconds=0.0)


@dataclass(frozen=True, slots=True)
class Hosts:
    """What serves."""

    targets: Sequence[str]
    """Of the sidecars."""
    _processes: Sequence["subprocess.Popen[str]"]

    def cpu_s(self) -> float:
        """Seconds of a core that all of them have used so far, in steps of the kernel's clock."""
        return sum(_cpu_s(process.pid) for process in self._processes)


def names(number: int) -> list[str]:
    """What so many engines are called."""
    return [f"engine-{one:03}" for one in range(number)]


def target(folder: Path, name: str) -> str:
    """Where the sidecar of that engine listens."""
    return f"unix:{folder}/{name}.sock"


@contextmanager
def hosts(number: int, folder: Path, log_path: Path, slow: Slow = NOBODY) -> Iterator[Hosts]:
    """So many engines with sidecars, their sockets in ``folder``."""
    called = names(number)
    with ExitStack() as stack:
        log = stack.enter_context(log_path.open("a"))
        shares = [called[first::PROCESSES] for first in range(min(PROCESSES, number))]
        processes = [_started(stack, [str(folder), *share], slow, log.fileno()) for share in shares]
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != SERVING:
                raise RuntimeError(f"the sidecars did not start; see {log_path}")
        yield Hosts([target(folder, name) for name in called], processes)


def _started(stack: ExitStack, arguments: Sequence[str], slow: Slow, log: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.fleet.host", *arguments]
    if slow.name:
        command += ["--slow", slow.name, "--slow-ms", f"{slow.seconds * 1e3:g}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    stack.callback(_end, process)
    return process


def _end(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _cpu_s(pid: int) -> float:
    """Of the process, by the kernel's books."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / TICKS
