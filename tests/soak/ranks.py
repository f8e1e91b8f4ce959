"""The trainer's processes as the soak's driver sees them.

Invariant: a rank that died stays a zombie until the end, so that its id, which names its files in /dev/shm, cannot be
anybody else's.
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

import psutil

from adapter.errors import LaunchError
from adapter.launch import ManagedProcess

_START_TIMEOUT_S = 180.0
# The rank makes its tensors, and looks for the sidecar, before its own deadline begins.
_ANSWER_MARGIN_S = 120.0
_EXIT_TIMEOUT_S = 30.0
_POLL_S = 0.02


class SoakRank:
    """One rank in a process of its own."""

    def __init__(self, target: str, rank: int, tp_size: int, log_path: Path) -> None:
        self.rank = rank
        self._commands, theirs = multiprocessing.Pipe()
        options = {"fd": theirs.fileno(), "target": target, "rank": rank, "tp-size": tp_size}
        argv = [f"--{name}={value}" for name, value in options.items()]
        with theirs:
            self.process = ManagedProcess(
                f"trainer rank {rank}",
                [sys.executable, "-m", "tests.soak.rank", *argv],
                log_path,
                pass_fds=[theirs.fileno()],
            )

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    @property
    def dead(self) -> bool:
        """Whether it has ended."""
        return self.process.has_exited()

    def wait_ready(self) -> None:
        """Until it has imported what it needs."""
        if self.receive(_START_TIMEOUT_S) is None:
            raise LaunchError(f"{self.process.name} died; its log:\n{self.process.log_text()}")

    def start_update(self, command: dict[str, Any]) -> None:
        """Let it send; returns at once."""
        self._commands.send_bytes(json.dumps(command).encode())

    def finish_update(self, timeout_s: float) -> dict[str, Any] | None:
        """How the update that was started went; None if the rank died of it."""
        return self.receive(timeout_s + _ANSWER_MARGIN_S)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next answer; None if the rank died. Raises ``LaunchError`` if it says nothing."""
        if not self.answers_within(timeout_s):
            raise LaunchError(f"{self.process.name} said nothing in {timeout_s} s; its log:\n{self.process.log_text()}")
        with contextlib.suppress(EOFError, ConnectionResetError):
            answer: dict[str, Any] = json.loads(self._commands.recv_bytes())
            return answer
        self.process.wait_exit(_EXIT_TIMEOUT_S)  # its sockets close a little before it is gone
        return None

    def answers_within(self, timeout_s: float) -> bool:
        """Whether there is an answer, or none to be expected any more, by then."""
        return self._commands.poll(timeout_s)

    def wait_stopped(self, timeout_s: float) -> bool:
        """Whether it is stopped by then; not if it answers or dies before."""
        process, give_up = psutil.Process(self.pid), time.monotonic() + timeout_s
        while process.status() != psutil.STATUS_STOPPED:
            if self.answers_within(_POLL_S) or time.monotonic() > give_up:
                return False
        return True

    def send_signal(self, number: signal.Signals) -> None:
        """To the rank itself, never to torch's helper beside it."""
        if not self.dead:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As the kernel does when memory runs out; returns when it is gone."""
        self.send_signal(signal.SIGKILL)
        self.process.wait_exit(_EXIT_TIMEOUT_S)

    def retire(self) -> None:
        """No more commands; the process is left as it is."""
        self._commands.close()

    def stop(self) -> None:
        """End it; closing the socket tells it to."""
        self.send_signal(signal.SIGCONT)
        self._commands.close()
        self.process.wait_exit(10.0)
        self.process.stop()
