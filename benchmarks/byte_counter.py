"""Counts the bytes that one side sends the other, by standing between them.

    with ByteCounter("unix:/run/sidecar.sock", "unix:/tmp/counted.sock") as counter:
        ...                                  # a client talks to /tmp/counted.sock
        assert counter.sent < 2000

Never in the way of anything that is timed. Invariant: bytes pass unchanged and in order; what is counted is all that a
connection carries, framing and headers included.
"""

import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

ACCEPT_S = 0.2
_POST = re.compile(rb"POST (?P<path>\S+) HTTP/1\.1\r\n(?P<headers>.*?)\r\n\r\n", re.DOTALL)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class ByteCounter:
    """Listens at ``listen`` (unix:/path or host:port, port 0 for any) and passes on to ``target``."""

    def __init__(self, target: str, listen: str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._from_client = bytearray()
        self.received = 0
        """Bytes that came back."""
        self._server = _listening(listen)
        self._server.settimeout(ACCEPT_S)
        self._ended = threading.Event()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        """Where it listens, on TCP."""
        return int(self._server.getsockname()[1])

    @property
    def sent(self) -> int:
        """Bytes from the client since ``reset``."""
        return len(self._from_client)

    def reset(self) -> None:
        """Count from here."""
        with self._lock:
            self._from_client.clear()
            self.received = 0

    def http_bodies(self, path: str) -> list[bytes]:
        """The bodies POSTed to ``path`` since ``reset``."""
        with self._lock:
            said = bytes(self._from_client)
        posts = [found for found in _POST.finditer(said) if found["path"] == path.encode()]
        lengths = [(post.end(), _LENGTH.search(post["headers"])) for post in posts]
        return [said[start : start + int(length[1])] for start, length in lengths if length]

    def close(self) -> None:
        """Cut every connection."""
        self._ended.set()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._server.close()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._server.accept()
            except TimeoutError:
                continue
            client.settimeout(None)
            self._serve(client, _connected(self._target))

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        self._open += [client, server]
        for pair in ((client, server, True), (server, client, False)):
            thread = threading.Thread(target=self._pump, args=pair, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                self._count(piece, from_client)
                sink.sendall(piece)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _count(self, piece: bytes, from_client: bool) -> None:
        with self._lock:
            if from_client:
                self._from_client += piece
            else:
                self.received += len(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listening(address: str) -> socket.socket:
    path = address.removeprefix("unix:")
    if path != address:
        Path(path).unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
    else:
        host, _, port = address.rpartition(":")
        server = socket.socket(socket.AF_INET)
        server.bind((host, int(port)))
    server.listen(64)
    return server


def _connected(address: str) -> socket.socket:
    path = address.removeprefix("unix:")
    if path != address:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return connection
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    connection.settimeout(None)
    return connection
