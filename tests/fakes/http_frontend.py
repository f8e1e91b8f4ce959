"""HTTP/1.1 with keep-alive on a port of its own, and a way to die in the middle of it.

Invariant: after ``cut_all`` the port refuses connections and every open one is at its end; after ``close`` no thread
is left.
"""

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.fakes.calls import Call, Reply

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
KEEP_ALIVE_S = 5.0

Answer = Callable[[Call], Reply | None]
"""The reply to a call, or None to cut its connection."""


class HttpFrontend:
    """Listens from its construction on."""

    def __init__(self, answer: Answer, port: int = 0) -> None:
        self._server = _Server(answer, port)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="scripted-engine")
        self._thread.start()

    def cut_all(self) -> None:
        """As the kernel does for a killed process. From any thread, also one that serves a call."""
        self._server.cut_all()

    def close(self) -> list[BaseException]:
        """Stop and wait for every thread. Returns what went wrong inside, which is nothing."""
        self.cut_all()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        return self._server.errors


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them
    request_queue_size = 128

    def __init__(self, answer: Answer, port: int) -> None:
        self.answer = answer
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_cut = False
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        with self._lock:
            self._open.add(connection)
            if self._is_cut:
                _reset(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        with self._lock:
            self._is_cut = True
            _shut(self.socket)  # first, so that whoever sees its connection end cannot make another
            for connection in self._open:
                _reset(connection)

    def service_actions(self) -> None:
        """Once the port is shut, its socket always looks readable: do not spin on it."""
        if self._is_cut:
            time.sleep(0.02)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.errors.append(error)


def _reset(connection: socket.socket) -> None:
    """The next close sends RST; reads and writes of ours end now."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    except OSError:  # closed by its own thread just now
        return
    _shut(connection)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "uvicorn"
    sys_version = ""
    timeout = KEEP_ALIVE_S
    wbufsize = 1 << 16  # headers and body in one segment
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        assert isinstance(self.server, _Server)
        reply = self.server.answer(self._call())
        if reply is None:
            self.close_connection = True
            _reset(self.connection)
        else:
            self._send(reply)

    def _call(self) -> Call:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        return Call(self.command, url.path, dict(parse_qsl(url.query)), headers, body, time.monotonic())

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        if reply.content_type:
            self.send_header("content-type", reply.content_type)
        self.send_header("content-length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: object) -> None:
        """Calls are recorded, not printed."""
