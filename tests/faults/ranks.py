"""The matrix's side of a rank's process: told what to do, asked what it saw, stopped, continued and killed.

Invariant: every wait has a deadline, and a process that was stopped is continued or killed before it is waited for.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from adapter.launch import ManagedProcess

ANSWER_S = 90.0
SHARED_MEMORY = Path("/dev/shm")


class RankProcess:
    """One trainer rank: ``module`` run with ``--fd``, ``--rank`` and these options."""

    def __init__(self, module: str, rank: int, log_path: Path, **options: object) -> None:
        self.rank = rank
        self._pipe, theirs = multiprocessing.Pipe()
        words = {"fd": theirs.fileno(), "rank": rank, **options}
        argv = [f"--{name.replace('_', '-')}={value}" for name, value in words.items()]
        with theirs:
            self.process = ManagedProcess(
                f"rank {rank}", [sys.executable, "-m", module, *argv], log_path, pass_fds=[theirs.fileno()]
            )
        self._events: list[dict[str, Any]] = []
        self.dead = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, do: str, **values: object) -> None:
        """One command; returns at once."""
        self._pipe.send_bytes(json.dumps({"do": do, **values}).encode())

    def start(self, job: dict[str, Any]) -> None:
        """Begin an update; events of the one before are forgotten."""
        self._events.clear()
        self.tell("update", **job)

    def wait(self, event: str, timeout_s: float = ANSWER_S, **values: object) -> dict[str, Any]:
        """The first such event since the last ``start``."""
        give_up = time.monotonic() + timeout_s
        while True:
            for seen in self._events:
                if seen["event"] == event and values.items() <= seen.items():
                    return seen
            left = give_up - time.monotonic()
            told = left > 0 and self._pipe.poll(left)
            assert told, f"rank {self.rank} told no {event!r}: {self.process.log_text()}"
            self._events.append(json.loads(self._pipe.recv_bytes()))

    def settle(self) -> list[int]:
        """How many hold each piece of its memory, once it has taken back what it may."""
        self._events.clear()
        self.tell("settle")
        counts: list[int] = self.wait("counts")["counts"]
        return counts

    def stop(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.dead = True
        os.kill(self.pid, signal.SIGKILL)
        assert self.process.wait_exit(ANSWER_S)

    def memory(self) -> list[Path]:
        """Its files in shared memory."""
        return sorted(SHARED_MEMORY.glob(f"torch_{self.pid}_*"))

    def remove_memory(self) -> None:
        """What a killed process leaves, and torch_shm_manager removes once the engine has let go of it too."""
        for file in self.memory():
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """End the process, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        self._pipe.close()
        self.process.wait_exit(5.0)
        for helper in self.process.session_members():  # torch's, which stays for as long as the engine is connected
            with contextlib.suppress(ProcessLookupError):
                os.kill(helper, signal.SIGKILL)
        self.process.stop()
        self.remove_memory()
