"""Ends what a trainer started, if the trainer goes without a word: killed, crashed, replaced by another program.

    python -I -S reaper.py --owner PID          (orders on standard input, its log on standard error)

Runs as a process of its own and leads its own session, so it survives whatever ends the trainer. Orders are JSON lines:
``{"watch": {"leader": 7, "started": 99, "grace_s": 5, "shm": ["sgl_shm_"]}}``, ``{"forget": 7}``, ``{"remove": PATH}``,
``{"remove_if_empty": FOLDER}`` and ``{"goodbye": true}``. Standard input that ends without a goodbye, or another parent
than the owner, means that the trainer is gone: every watched session is ended (SIGTERM to its leader, later SIGKILL to
each member by its id), then its shared memory and the paths are removed.

Invariant: only processes of a watched session are ended. A session's number stays taken while one of its members
lives, and a leader whose start time is another one is a stranger. This file is run by its path and imports the standard
library alone, so that it costs 10 MB and starts at once; ``adapter.launch`` uses its functions too.
"""

import argparse
import contextlib
import json
import logging
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps it
_POLL_S = 0.1
_TICK_S = 1.0
# Reading a large process's mappings takes milliseconds, in which it cannot map anything.
_LOOK_S = 10.0
_KILL_S = 30.0

logger = logging.getLogger("weight-sync-reaper")


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What the kernel tells of one process."""

    state: str
    session: int
    started: int
    """In clock ticks since the machine's start; with its id, it names a process for good."""

    @property
    def is_alive(self) -> bool:
        """Zombies only wait for their parent."""
        return self.state not in "ZX"


def process_state(pid: int) -> ProcessState | None:
    """None if there is no such process, or it is another user's and hidden (the hidepid option of /proc)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The command's name, in parentheses, may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return ProcessState(state=fields[0], session=int(fields[3]), started=int(fields[19]))


@dataclass(frozen=True, slots=True)
class Session:
    """A session, by the process that leads it."""

    leader: int
    started: int

    def leads(self) -> bool:
        """Whether its leader lives."""
        state = process_state(self.leader)
        return state is not None and state.is_alive and state.started == self.started

    def members(self) -> list[int]:
        """Its live processes."""
        leader = process_state(self.leader)
        if leader is not None and leader.started != self.started:
            return []  # the number is another's by now
        return list(_processes_of(self.leader))

    def kill(self) -> None:
        """SIGKILL to every member until none is left, but for those that a driver does not let go of."""
        deadline = time.monotonic() + _KILL_S
        while (members := self.members()) and time.monotonic() < deadline:
            for pid in members:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _processes_of(session: int) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            state = process_state(int(entry))
            if state is not None and state.session == session and state.is_alive:
                yield int(entry)


def shared_memory_of(pids: Sequence[int], prefixes: Sequence[str]) -> set[str]:
    """Names, beginning with one of ``prefixes``, of the shared memory that these processes have mapped.

    Files are compared, not names: a semaphore is mapped under another name by whoever made it.
    """
    mapped = {file for pid in pids if prefixes for file in _mapped_files(pid)}
    return {name for name, file in _shared_files(tuple(prefixes)) if file in mapped}


def _mapped_files(pid: int) -> Iterator[tuple[int, int]]:
    """Device and inode of the shared memory that a process has mapped."""
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            if f" {SHARED_MEMORY}/" in line:
                device, inode = line.split()[3:5]
                major, minor = device.split(":")
                yield os.makedev(int(major, 16), int(minor, 16)), int(inode)


def _shared_files(prefixes: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, device and inode."""
    for name in os.listdir(SHARED_MEMORY) if prefixes else ():
        if name.startswith(prefixes):
            with contextlib.suppress(OSError):  # it has gone
                status = os.stat(SHARED_MEMORY / name)
                yield name, (status.st_dev, status.st_ino)


def remove_shared_memory(names: set[str]) -> None:
    """Unlinks; whatever is gone already is no matter."""
    for name in names:
        with contextlib.suppress(OSError):
            (SHARED_MEMORY / name).unlink()


@dataclass(slots=True)
class Watched:
    """A session to end, and the shared memory that it was seen to use."""

    session: Session
    grace_s: float
    prefixes: tuple[str, ...]
    names: set[str] = field(default_factory=set)

    def look(self) -> list[int]:
        """Its members now; remembers their shared memory."""
        members = self.session.members()
        self.names |= shared_memory_of(members, self.prefixes)
        return members

    def ask_to_end(self) -> None:
        """SIGTERM to the leader."""
        if self.session.leads():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.session.leader, signal.SIGTERM)


class Watch:
    """All that is watched, and how it is ended."""

    def __init__(self) -> None:
        self._watched: dict[int, Watched] = {}
        self._paths: list[str] = []
        self._folders: list[str] = []
        self.dismissed = False

    def obey(self, line: bytes) -> None:
        """One order."""
        order: dict[str, Any] = json.loads(line)
        if "watch" in order:
            self._watch(**order["watch"])
        elif "forget" in order:
            self._watched.pop(order["forget"], None)
        elif "remove" in order:
            self._paths.append(order["remove"])
        elif "remove_if_empty" in order:
            self._folders.append(order["remove_if_empty"])
        else:
            self.dismissed = True

    def _watch(self, leader: int, started: int, grace_s: float, shm: Sequence[str]) -> None:
        self._watched[leader] = Watched(Session(leader, started), grace_s, tuple(shm))

    def look(self) -> None:
        """Remember shared memory, for the day when its users are dead and can no longer tell."""
        for watched in self._watched.values():
            watched.look()

    def reap(self) -> None:
        """End everything."""
        sessions = list(self._watched.values())
        logger.info("the trainer is gone; ending %s", [watched.session.leader for watched in sessions] or "nothing")
        self.look()
        for watched in sessions:
            watched.ask_to_end()
        self._wait(sessions)
        for watched in sessions:
            watched.session.kill()
            remove_shared_memory(watched.names)
        for path in self._paths:
            _remove(path)
        for folder in self._folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        logger.info("all of it has ended")

    @staticmethod
    def _wait(sessions: Sequence[Watched]) -> None:
        deadline = time.monotonic() + max((watched.grace_s for watched in sessions), default=0.0)
        while any(watched.session.members() for watched in sessions) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def serve(orders: int, owner: int) -> None:
    """Obeys until the owner says goodbye or is gone."""
    watch, unread, last_look = Watch(), b"", time.monotonic()
    while not watch.dismissed:
        gone = os.getppid() != owner  # asked too, since a forked child of the owner may hold the pipe open
        readable, _, _ = select.select([orders], [], [], 0.0 if gone else _TICK_S)
        received = os.read(orders, 65536) if readable else b""
        *lines, unread = (unread + received).split(b"\n")
        for line in lines:
            watch.obey(line)
        if not received and (readable or gone):
            return watch.reap()
        if time.monotonic() - last_look > _LOOK_S:
            watch.look()
            last_look = time.monotonic()
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The whole process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--owner", type=int, required=True, help="the trainer's process id")
    options = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # whatever ends the trainer must not end this
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level="INFO", format="%(asctime)s %(name)s: %(message)s")
    serve(sys.stdin.fileno(), options.owner)
    return 0


if __name__ == "__main__":
    sys.exit(main())
