"""How long an engine may keep a trainer's memory mapped: told by locks on a file, with no call and no polling.

One empty file in /dev/shm stands for one region of memory. The trainer locks its first byte for as long as the region
may be kept; whoever keeps it mapped locks the second. Both are the kernel's word: a process that dies, however it does,
holds no lock any more. Standard library alone, for both sides: the trainer (``Lease``) and SGLang's scheduler
(``KeptUnder``). Locks are of the open file (F_OFD), so that threads and copies of descriptors do not lose them.

Invariant: while the second byte is locked, somebody may read the region; the first one unlocked asks him to let go.
"""

import fcntl
import os
import re
import secrets
import struct
import time
from contextlib import suppress
from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
NAME = re.compile("sglang-weight-sync-lease-[0-9a-f]{32}")
SHM_PREFIX = "/dev/shm/"  # noqa: S108 - the same
OWNER, KEEPER = 0, 1
LOOK_S = 0.001


class Lease:
    """The trainer's side of one region."""

    def __init__(self) -> None:
        self.name = f"sglang-weight-sync-lease-{secrets.token_hex(16)}"
        self._pid = os.getpid()
        self._file = os.open(_path(self.name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _lock(self._file, fcntl.F_WRLCK, OWNER)

    def is_kept(self) -> bool:
        """Whether a living process keeps the region mapped."""
        return self._file >= 0 and _is_locked(self._file, KEEPER)

    def ask_back(self) -> None:
        """Ask for the region to be let go, without waiting."""
        if self._file >= 0 and self._pid == os.getpid():
            _lock(self._file, fcntl.F_UNLCK, OWNER)

    def end(self, patience_s: float) -> bool:
        """Ask for the region to be let go; whether it was, within ``patience_s``."""
        if self._file < 0:
            return True
        self.ask_back()
        give_up = time.monotonic() + patience_s
        while self.is_kept():
            if time.monotonic() > give_up:
                return False
            time.sleep(LOOK_S)
        self._remove()
        return True

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self._remove()

    def _remove(self) -> None:
        os.close(self._file)
        self._file = -1
        if self._pid == os.getpid():  # a forked child has a copy of the open file, which is its parent's
            with suppress(FileNotFoundError):
                os.unlink(SHM_PREFIX + self.name)


class KeptUnder:
    """The side of the one that keeps the region mapped.

    Raises ``ValueError`` for a name that is no lease's, and ``OSError`` if there is no such lease any more.
    """

    def __init__(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is not the name of a lease")
        self.name = name
        self._file = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        _lock(self._file, fcntl.F_RDLCK, KEEPER)
        if not self.is_wanted():
            self.let_go()
            raise FileNotFoundError(f"the lease {name} has ended")

    def is_wanted(self) -> bool:
        """Whether the owner lives and has not asked for the region back."""
        return self._file >= 0 and _is_locked(self._file, OWNER)

    def wait_until_unwanted(self) -> None:
        """Until the owner asks for the region back, or is gone; for a thread of its own."""
        _lock(self._file, fcntl.F_RDLCK, OWNER, wait=True)

    def let_go(self) -> None:
        """The region is not mapped any more. What a dead owner has left of the lease goes, too."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        if not _is_locked(file, OWNER):
            with suppress(FileNotFoundError):
                _path(self.name).unlink()
        _lock(file, fcntl.F_UNLCK, KEEPER)  # a thread that waits in the kernel keeps the file open a while longer
        os.close(file)


def _path(name: str) -> Path:
    return SHM / name


def _lock(file: int, kind: int, byte: int, *, wait: bool = False) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _flock(kind, byte))


def _is_locked(file: int, byte: int) -> bool:
    """Whether somebody else has a lock on it that a write lock would have to wait for."""
    found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    kind: int = struct.unpack_from("h", found)[0]
    return kind != fcntl.F_UNLCK


def _flock(kind: int, byte: int) -> bytes:
    """Linux' ``struct flock``: type, whence, start, length, and a process id, which must be 0 here."""
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, byte, 1, 0)
