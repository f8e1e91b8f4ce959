"""A child process that leads a session of its own, with its output in a log file.

Invariant: ``stop`` ends exactly the processes of that session, children included, and returns when none is left;
nothing is ever looked up by name. The leader stays unreaped until then, so that the kernel cannot give its id to
anybody else. Shared memory that the session was seen to use goes with it, also when it was killed before.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from adapter.errors import LaunchError
from adapter.launch.reaper import Session, process_state, remove_shared_memory, shared_memory_of
from adapter.launch.reaper_process import ReaperProcess

_POLL_S = 0.1
_LOOK_S = 1.0
_LOG_TAIL_BYTES = 4000
# Helpers that outlive their leader by a moment remove files on their way out, so they get that moment.
_LINGER_S = 5.0
_REAP_S = 10.0
# Nobody waits for what an orphan still has in hand.
_ORPHANS_GRACE_S = 8.0


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """A process as others on its host can look at it, whoever started it."""

    name: str
    pid: int
    started: int
    log_path: str
    log_start: int

    def has_ended(self) -> bool:
        """Whether it has; another process of its number is not it."""
        return not Session(self.pid, self.started).leads()

    def log_text(self) -> str:
        """What it has written so far; empty where its log cannot be read."""
        try:
            with Path(self.log_path).open("rb") as log:
                log.seek(self.log_start)
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def log_tail(self) -> str:
        """The end of its log, as the end of a message."""
        return f"; the end of {self.log_path}:\n{self.log_text()[-_LOG_TAIL_BYTES:].strip()}"


class ManagedProcess:
    """One child process that leads its own session.

    Args:
        name: What messages call it.
        argv: The command.
        log_path: Where its output goes; added to if it exists.
        env: Variables to set, or to unset where the value is None, on top of this process's own.
        grace_s: How long `stop` waits between SIGTERM and SIGKILL.
        pass_fds: File descriptors that the child inherits.
        shm_prefixes: How the names of the shared memory begin that is to go with it.
        reaper: Ends it if this process cannot.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log_path: Path,
        *,
        env: Mapping[str, str | None] | None = None,
        grace_s: float = 20.0,
        pass_fds: Sequence[int] = (),
        shm_prefixes: Sequence[str] = (),
        reaper: ReaperProcess | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._grace_s = grace_s
        self._shm_prefixes = tuple(shm_prefixes)
        self._shm_names: set[str] = set()
        self._next_look = 0.0
        self._reaper = reaper
        self._owner = os.getpid()
        merged = {**os.environ, **(env or {})}
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                list(argv),
                env={key: value for key, value in merged.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        self._session = self._identify()
        if reaper is not None:
            reaper.watch(self._session, grace_s=min(grace_s, _ORPHANS_GRACE_S), shm=self._shm_prefixes)

    def _identify(self) -> Session:
        state = process_state(self._popen.pid)
        assert state is not None, "a child that is not reaped keeps its entry"
        return Session(self._popen.pid, state.started)

    @property
    def pid(self) -> int:
        """The session's leader."""
        return self._popen.pid

    @property
    def facts(self) -> ProcessFacts:
        """What others need to look at it."""
        return ProcessFacts(self.name, self.pid, self._session.started, str(self.log_path), self._log_start)

    def has_exited(self) -> bool:
        """Whether the leader has ended. Does not reap it."""
        if self._popen.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def log_text(self) -> str:
        """What the process has written so far."""
        return self.facts.log_text()

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Polls until `is_ready`.

        Raises:
            LaunchError: The process ended first, or the time ran out. Carries the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            self.check_starting()
            if time.monotonic() > deadline:
                raise self.not_ready(timeout_s)
            time.sleep(_POLL_S)
        self.look()

    def check_starting(self) -> None:
        """Raises `LaunchError` if the process has ended while it was expected to become ready."""
        if self.has_exited():
            raise LaunchError(f"{self.name} ended before it was ready{self.facts.log_tail()}")
        if time.monotonic() > self._next_look:
            self.look()

    def not_ready(self, timeout_s: float) -> LaunchError:
        """For one that takes too long."""
        return LaunchError(f"{self.name} was not ready within {timeout_s:g} s{self.facts.log_tail()}")

    def wait_exit(self, timeout_s: float) -> bool:
        """Whether the leader ends within the time."""
        deadline = time.monotonic() + timeout_s
        while not self.has_exited():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def look(self) -> None:
        """Remember the session's shared memory, for the case that nobody is left who could tell."""
        self._shm_names |= shared_memory_of(self.session_members(), self._shm_prefixes)
        self._next_look = time.monotonic() + _LOOK_S

    def stop(self) -> None:
        """Ends the session: SIGTERM to its leader, later SIGKILL to whatever is left. May be called again.

        A forked child of the process that started it ends nothing.
        """
        if self._popen.returncode is not None or os.getpid() != self._owner:
            return
        try:
            self.look()
            if not self.has_exited():
                self._popen.terminate()
                self.wait_exit(self._grace_s)
            self._wait_for_helpers()
        finally:  # also when Ctrl-C comes in the middle of the wait
            self._session.kill()
            if self._reaper is not None:
                self._reaper.forget(self._session)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_REAP_S)
            remove_shared_memory(self._shm_names)

    def session_members(self) -> list[int]:
        """The processes of the session that still run."""
        return self._session.members()

    def _wait_for_helpers(self) -> None:
        deadline = time.monotonic() + _LINGER_S
        while self.has_exited() and self.session_members() and time.monotonic() < deadline:
            time.sleep(_POLL_S)


class Started:
    """A process that its owner starts with the object and stops with the `with` block."""

    process: ManagedProcess

    def __init__(self, process: ManagedProcess, timeout_s: float, *, wait: bool) -> None:
        self.process = process
        try:
            if wait:
                process.wait_until(self.is_ready, timeout_s)
        except BaseException:  # whatever ends the wait, Ctrl-C too, must not leave the process behind
            self.stop()
            raise

    def is_ready(self) -> bool:
        """Whether it serves."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process that was started; its children belong to it."""
        return self.process.pid

    def stop(self) -> None:
        """Ends it and its children. May be called again."""
        self.process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
