"""Where the server listens: one sidecar per address.

Invariant: a socket file that another live sidecar holds is never taken over. gRPC alone would steal it silently, and
delete it on exit; so a lock file beside it is held for as long as the process lives (the kernel lets go of it).
"""

import fcntl
import os
from pathlib import Path

import grpc

from sidecar.config import Address, TcpAddress, UnixAddress


class AddressInUseError(Exception):
    """Another process serves there."""


def listen(server: grpc.aio.Server, address: Address) -> Address:
    """Bind ``server``: returns the address with the port that the system chose; raises ``AddressInUseError``."""
    match address:
        case UnixAddress(path):
            _lock(path)
            try:
                server.add_insecure_port(str(address))
            except RuntimeError as error:
                raise AddressInUseError(f"cannot listen on {address}; is it a folder, or not ours to write?") from error
            return address
        case TcpAddress(host):
            try:
                return TcpAddress(host, server.add_insecure_port(str(address)))
            except RuntimeError as error:
                raise AddressInUseError(f"cannot listen on {address}; is another process there?") from error


def private_umask() -> None:
    """Socket files are for this user alone: connecting needs write permission."""
    os.umask(0o077)


def _lock(socket: Path) -> None:
    """Hold ``<socket>.lock`` until the process ends; the descriptor is left open on purpose."""
    descriptor = os.open(f"{socket}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise AddressInUseError(f"another sidecar serves unix:{socket}; give this one another socket") from error
