"""The connections between ranks and sidecar: a Unix socket per rank, which can be cut or made to swallow answers.

    rank r  --->  rank<r>.sock  --->  sidecar.sock

Invariant: what one end closes, the other sees closed at once, so a killed process looks killed through the wire; a
new connection works again, whatever was done to those before it.
"""

import contextlib
import select
import socket
import threading
from pathlib import Path

CHUNK = 1 << 16


class Wire:
    """One rank's way to the sidecar."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._target = target
        self._lock = threading.Lock()
        self._open: set[_Connection] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._acceptor = threading.Thread(target=self._accept, name=f"wire {path.name}")
        self._acceptor.start()

    def cut(self) -> None:
        """End every connection that exists."""
        with self._lock:
            for connection in self._open:
                connection.cut()

    def swallow(self) -> None:
        """From now on, what the sidecar says on connections that exist does not arrive."""
        with self._lock:
            for connection in self._open:
                connection.deaf = True

    def close(self) -> None:
        """Stop listening, end everything, wait for every thread."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self._target))
            except OSError:  # no sidecar: refuse, as its own socket would
                far.close()
                near.close()
                continue
            self._serve(_Connection(near, far))

    def _serve(self, connection: "_Connection") -> None:
        thread = threading.Thread(target=self._carry, args=(connection,), name=f"wire {self.path.name} connection")
        with self._lock:
            self._open.add(connection)
            self._threads = [thread for thread in self._threads if thread.is_alive()] + [thread]
            thread.start()

    def _carry(self, connection: "_Connection") -> None:
        try:
            connection.carry()
        finally:
            with self._lock:
                self._open.discard(connection)
                connection.close()


class _Connection:
    """Two sockets, and one thread that carries bytes between them."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._near, self._far = near, far
        self.deaf = False

    def carry(self) -> None:
        """Until either end closes."""
        while True:
            readable, _, _ = select.select([self._near, self._far], [], [])
            for source in readable:
                with contextlib.suppress(OSError):
                    data = source.recv(CHUNK)
                    if data and not (self.deaf and source is self._far):
                        (self._far if source is self._near else self._near).sendall(data)
                    if data:
                        continue
                return

    def cut(self) -> None:
        for end in (self._near, self._far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._near.close()
        self._far.close()
