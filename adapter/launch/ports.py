"""TCP ports for servers that are started here, and who listens where.

Invariant: two processes that claim ports by this module never get the same one, though neither of their servers
listens yet: a claim is held in the abstract socket namespace, which is shared exactly as far as ports are, and which
the kernel empties with the process.
"""

import contextlib
import os
import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

_LISTENING = "0A"
_ACCEPTS = 1 << 16


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now.

    Below the range that outgoing connections take theirs from, and low enough for SGLang 0.5.15, which also wants the
    port 10000 above to exist.
    """
    while True:
        port = random.randrange(20_000, 30_000)  # noqa: S311 - no secret
        if is_free(port):
            return port


def is_free(port: int) -> bool:
    """Whether this port of the loopback interface could be bound now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no matter
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class PortClaim:
    """A free port that no other claim names; held until ``close``."""

    def __init__(self, port: int, held: socket.socket) -> None:
        self.port = port
        self._held = held

    @classmethod
    def take(cls, port: int) -> Self | None:
        """None if the port is in use or claimed."""
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(f"\0sglang-weight-sync/port/{port}")
        except OSError:
            held.close()
            return None
        if is_free(port):
            return cls(port, held)
        held.close()
        return None

    @classmethod
    def take_any(cls, preferred: int) -> Self:
        """The preferred port, else another one."""
        claim = cls.take(preferred)
        while claim is None:
            claim = cls.take(free_port())
        return claim

    def close(self) -> None:
        """Let others have it. May be called again."""
        self._held.close()


def listens_elsewhere(address: int | Path, pids: Sequence[int]) -> bool:
    """Whether a process listens at this port, or at this socket file, that is none of these.

    False also where this host does not show who listens.
    """
    return listens_among(address, pids) is False


def listens_among(address: int | Path, pids: Sequence[int]) -> bool | None:
    """Whether one of these processes listens there; None where nobody is seen to listen."""
    listeners = set(_port_listeners(address) if isinstance(address, int) else _file_listeners(address))
    return any(listeners & set(_sockets(pid)) for pid in pids) if listeners else None


def _file_listeners(path: Path) -> Iterator[str]:
    """Inodes of the sockets that listen at the file; connections that were accepted bear its name, too."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
            *fields, name = line.split(maxsplit=7)
            if len(fields) == 7 and int(fields[3], 16) & _ACCEPTS and os.path.abspath(name) == os.path.abspath(path):
                yield fields[6]


def _port_listeners(port: int) -> Iterator[str]:
    """Inodes of the sockets that listen at the port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _sockets(pid: int) -> Iterator[str]:
    """Inodes of the sockets that the process has open."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{entry}")
                if target.startswith("socket:["):
                    yield target[len("socket:[") : -1]
