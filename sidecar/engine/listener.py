"""Which process listens at an engine's port, where this host shows it: another one is another life of the engine.

Pure reading of /proc (Linux). Invariant: "" means "not seen" (another host, user or namespace), never "nobody".
"""

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

PROC = Path("/proc")
LISTEN_STATE = "0A"
START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted from the field after the command's closing parenthesis (proc(5): field 22)."""


def listener_of(url: str) -> str:
    """``PID/START`` of the first process that listens at this loopback address; "" if that cannot be seen."""
    address = _loopback(url)
    sockets = set(_listening_sockets(*address)) if address else set()
    owners = [_identity(pid) for pid in _processes() if sockets and _holds(pid, sockets)]
    # A forked child may hold the socket too: the oldest is the server.
    return min(filter(None, owners), key=lambda owner: int(owner.partition("/")[2]), default="")


def is_alive(process: str) -> bool:
    """Whether that very process still runs; True where it was not seen."""
    return not process or _identity(int(process.partition("/")[0])) == process


def _loopback(url: str) -> tuple[frozenset[str], int] | None:
    """The addresses at which a server of this url may listen, and its port; None if it is not on this host."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if not address.is_loopback:
        return None
    mapped = {f"::ffff:{address}"} if address.version == 4 else set()
    also = {"::1"} if parts.hostname == "localhost" else set()
    return frozenset({str(address), "0.0.0.0", "::", *mapped, *also}), port  # noqa: S104 - looked for, not bound


def _listening_sockets(hosts: frozenset[str], port: int) -> Iterator[str]:
    """What /proc/PID/fd calls the sockets of this network namespace that listen there."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                address, _, at_port = fields[1].rpartition(":")
                if fields[3] == LISTEN_STATE and int(at_port, 16) == port and _readable(address) in hosts:
                    yield f"socket:[{fields[9]}]"


def _readable(address: str) -> str:
    """An address as the kernel prints it, in 32-bit words of the machine's own byte order."""
    words = struct.iter_unpack("=I", bytes.fromhex(address))
    packed = b"".join(struct.pack("!I", word) for (word,) in words)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


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
