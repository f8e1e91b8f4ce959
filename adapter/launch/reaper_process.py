"""The trainer's end of the reaper: a small process that ends what the trainer started if the trainer cannot.

    with ReaperProcess(log_path) as reaper:
        process = ManagedProcess("the server", argv, log_path, reaper=reaper)

See ``adapter.launch.reaper`` for what it does. Invariant: orders go out in the order in which they are given, each
whole; the pipe is closed by the kernel when this process ends or becomes another program, however that happens.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from adapter.launch import reaper
from adapter.launch.reaper import Session

_GOODBYE_S = 5.0


class ReaperProcess:
    """Runs from construction until ``close``; only the process that made it gives it orders."""

    def __init__(self, log_path: Path) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        command = [sys.executable, "-I", "-S", str(Path(reaper.__file__)), "--owner", str(self._owner)]
        with log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, bufsize=0
            )

    @property
    def pid(self) -> int:
        """The process; its session has no other."""
        return self._popen.pid

    def watch(self, session: Session, *, grace_s: float, shm: Sequence[str] = ()) -> None:
        """End this session with the trainer, and unlink its shared memory of these name prefixes."""
        order = {"leader": session.leader, "started": session.started, "grace_s": grace_s, "shm": list(shm)}
        self._order({"watch": order})

    def forget(self, session: Session) -> None:
        """The trainer ends this one itself; said before its leader is reaped, so that its number is still its own."""
        self._order({"forget": session.leader})

    def remove(self, path: Path) -> None:
        """A file or folder that goes with the trainer."""
        self._order({"remove": str(path)})

    def remove_if_empty(self, folder: Path) -> None:
        """A folder that goes with the trainer, but not with what others have put there."""
        self._order({"remove_if_empty": str(folder)})

    def close(self) -> None:
        """Say goodbye: nothing is left to end. May be called again."""
        if self._popen.returncode is not None or os.getpid() != self._owner:
            return
        self._order({"goodbye": True})
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:  # stopped by somebody
            self._popen.kill()
            self._popen.wait()

    def _order(self, order: dict[str, object]) -> None:
        if os.getpid() != self._owner:
            return
        assert self._popen.stdin is not None
        # One that somebody has killed can only be done without.
        with self._lock, contextlib.suppress(OSError):
            self._popen.stdin.write(json.dumps(order).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
