"""Which process listens at an engine's port, where this host shows it: another one is another life of the engine.

Pure reading of /proc (Linux). Invariant: "" means "not seen" (another host, user or namespace), never "nobody".
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

PROC = Path("/proc")
LISTEN_STATE = "0A"
START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted from the field after the command's closing parenthesis (proc(5): field 22)."""


def listener_of(url: str) -> str:
    """``PID/START`` of the first process that listens at this loopback address; "" if that cannot be seen."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if parts.hostname not in ("localhost", "::1") and not (parts.hostname or "").startswith("127."):
        return ""
    sockets = set(_listening_sockets(port))
    owners = [_identity(pid) for pid in _processes() if sockets and _holds(pid, sockets)]
    # A forked child may hold the socket too: the oldest is the server.
    return min(filter(None, owners), key=lambda owner: int(owner.partition("/")[2]), default="")


def is_alive(process: str) -> bool:
    """Whether that very process still runs; True where it was not seen."""
    return not process or _identity(int(process.partition("/")[0])) == process


def _listening_sockets(port: int) -> Iterator[str]:
    """What /proc/PID/fd calls the sockets of this network namespace that listen at ``port``."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN_STATE and int(fields[1].rpartition(":")[2], 16) == port:
                    yield f"socket:[{fields[9]}]"


def _processes() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def _holds(pid: int, sockets: set[str]) -> bool:
    try:
        with os.scandir(PROC / str(pid) / "fd") as descriptors:
            return any(_target(entry.path) in sockets for entry in descriptors)
    except OSError:  # it ended, or belongs to somebody else
        return False


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _identity(pid: int) -> str:
    try:
        after_name = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if after_name[0] in "ZX" else f"{pid}/{after_name[START_TIME_FIELD]}"
