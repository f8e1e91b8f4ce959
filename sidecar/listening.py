"""Where the server listens, and with which certificate: one sidecar per address, and one per engine.

Invariant: a socket file that another live sidecar holds is never taken over. gRPC alone would steal it silently, and
delete it on exit; so a lock file beside it is held for as long as the process lives (the kernel lets go of it).
"""

import errno
import fcntl
import hashlib
import logging
import os
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from sidecar.config import Address, TcpAddress, TlsFiles, UnixAddress

logger = logging.getLogger(__name__)


class AddressInUseError(Exception):
    """Another process serves there."""


def listen(server: grpc.aio.Server, address: Address, tls: TlsFiles | None = None) -> Address:
    """Bind ``server``: returns the address with the port that the system chose; raises ``AddressInUseError``."""
    match address:
        case UnixAddress(path):
            _lock(path)
            try:
                _add_port(server, address, tls)
            except RuntimeError as error:
                raise AddressInUseError(f"cannot listen on {address}; is it a folder, or not ours to write?") from error
            return address
        case TcpAddress(host):
            try:
                return TcpAddress(host, _add_port(server, address, tls))
            except RuntimeError as error:
                raise AddressInUseError(f"cannot listen on {address}; is another process there?") from error


def claim_engine(url: str) -> socket.socket:
    """Hold a name for the engine until the process ends; raises ``AddressInUseError`` if another sidecar does.

    An abstract socket: seen by whoever shares this network, as the engine's own loopback address is, and let go of by
    the kernel.
    """
    parts = urlsplit(url)
    here = parts.hostname in ("localhost", "::1", "::", "0.0.0.0") or str(parts.hostname).startswith("127.")  # noqa: S104
    port = parts.port or (443 if parts.scheme == "https" else 80)
    engine = f"{'loopback' if here else parts.hostname}:{port}{parts.path.rstrip('/')}"
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind("\0sglang-weight-sync/" + hashlib.sha256(engine.encode()).hexdigest())
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        message = f"another sidecar on this host serves the engine at {url}; stop that one first"
        raise AddressInUseError(message) from error
    return held


def private_umask() -> None:
    """Socket files are for this user alone: connecting needs write permission."""
    os.umask(0o077)


def _add_port(server: grpc.aio.Server, address: Address, tls: TlsFiles | None) -> int:
    if tls is None:
        return server.add_insecure_port(str(address))
    return server.add_secure_port(str(address), _Certificates(tls).credentials())


class _Certificates:
    """The files of a ``TlsFiles``, looked at again for every handshake."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen: object = None

    def credentials(self) -> grpc.ServerCredentials:
        """What gRPC takes; raises ``OSError``."""
        changed: Any = self._changed  # may answer None, whatever the stubs say
        return grpc.dynamic_ssl_server_credentials(
            self._read(), changed, require_client_authentication=self._files.client_ca is not None
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its; None: as before."""
        try:
            return None if self._stamps() == self._seen else self._read()
        except (OSError, ValueError) as error:  # half-way through being replaced
            logger.warning("the certificate is kept as it was: %s", error)
            return None

    def _read(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        stamps = self._stamps()
        _check(files)
        configuration = grpc.ssl_server_certificate_configuration(
            [(files.key.read_bytes(), files.certificate.read_bytes())],
            root_certificates=files.client_ca.read_bytes() if files.client_ca else None,
        )
        if self._seen is not None:
            logger.info("the certificate in %s was read again", files.certificate)
        self._seen = stamps
        return configuration

    def _stamps(self) -> object:
        paths = filter(None, (self._files.certificate, self._files.key, self._files.client_ca))
        return [(stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in map(os.stat, paths)]


def _check(files: TlsFiles) -> None:
    """Raise ``ValueError`` for files with which gRPC would serve, and fail at every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
    except ssl.SSLError as error:
        problem = f"{files.certificate}, {files.key}" + (f" and {files.client_ca}" if files.client_ca else "")
        raise ValueError(f"TLS cannot be served with {problem}: {error.reason or error}") from error


def _lock(path: Path) -> None:
    """Hold ``<socket>.lock`` until the process ends; the descriptor is left open on purpose."""
    descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise AddressInUseError(f"another sidecar serves unix:{path}; give this one another socket") from error
