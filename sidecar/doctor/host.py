"""The one seam between the checks and the machine: files below a root, the environment, the user, limits and time.

Invariant: what a check knows of this host it has from a ``Host``, so that a test plants a fault with a folder. None
or an empty string means "not seen", never "not there".
"""

import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sidecar.engine.listener import listener_of

SELF = "self"
ROOT_USER = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """This machine, as the process that asks sees it."""

    root: Path = Path("/")
    """Below it lie proc, dev/shm and the temporary folder."""
    environ: Mapping[str, str] = field(default_factory=dict)
    uid: int
    open_files: int
    """How many files this process may have open (RLIMIT_NOFILE, the soft one)."""
    now: Callable[[], float] = time.time
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    listener: Callable[[str], str] = listener_of
    """``PID/START`` of what listens at a url; empty where that is not seen."""

    @classmethod
    def here(cls) -> Self:
        """This very machine."""
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return cls(environ=os.environ, uid=os.geteuid(), open_files=open_files)

    @property
    def proc(self) -> Path:
        """Where the kernel shows processes."""
        return self.root / "proc"

    @property
    def shm(self) -> Path:
        """Where POSIX shared memory lives."""
        return self.at("/dev/shm")  # noqa: S108 - looked at, not written to

    def at(self, path: str) -> Path:
        """An absolute path, as this process sees it."""
        return self.root / path.lstrip("/")

    def seen_by(self, pid: str, path: str) -> Path:
        """The same path, as that process sees it."""
        return self.proc / pid / "root" / path.lstrip("/")

    def text(self, *parts: str) -> str | None:
        """A file of /proc; None if it cannot be read."""
        try:
            return self.proc.joinpath(*parts).read_text(errors="replace")
        except OSError:
            return None

    def namespace(self, pid: str, kind: str) -> str:
        """What the kernel calls a process's namespace; empty if this user may not see it."""
        try:
            return os.readlink(self.proc / pid / "ns" / kind)
        except OSError:
            return ""

    def status(self, pid: str, name: str) -> list[str]:
        """The values of one line of /proc/PID/status, which everybody may read; empty if there is none."""
        lines = (self.text(pid, "status") or "").splitlines()
        return next((line.split()[1:] for line in lines if line.startswith(f"{name}:")), [])

    def environ_of(self, pid: str) -> Mapping[str, str] | None:
        """What a process was started with; None if it cannot be read, or was overwritten by a title."""
        entries = (self.text(pid, "environ") or "").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry) or None
