"""Probes and metrics over plain HTTP, for those that cannot speak gRPC: GET /livez, /readyz, /metrics.

/readyz?version=7 is for a router in front of a fleet: ready, and serving that version.

Owns its port and every connection to it. Invariant: whoever is at the other end, and however slowly he reads or writes,
costs at most one of ``MAX_CONNECTIONS`` for ``PATIENCE_S``; nothing can be changed here, and reasons, which may quote a
trainer's words, are not told.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

import h11

from sidecar.config import TcpAddress

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
PATIENCE_S = 5.0
READ_BYTES = 1 << 14
TEXT = "text/plain; charset=utf-8"


Query = Mapping[str, str]
"""What comes after the question mark."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe gets."""

    content: bytes
    status: int = 200
    content_type: str = TEXT


class ProbeServer:
    """Answers by path; each answer is made when it is asked for."""

    def __init__(self, answers: Mapping[str, Callable[[Query], Answer]]) -> None:
        self._answers = answers
        self._server: asyncio.Server | None = None
        self._connections = 0

    async def start(self, address: TcpAddress) -> TcpAddress:
        """Serve; returns the address with the port that the system chose. Raises ``OSError``."""
        self._server = await asyncio.start_server(self._connected, address.host, address.port, limit=READ_BYTES)
        return TcpAddress(address.host, self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening; open connections end by themselves."""
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._serve_one(reader, writer)
        except (OSError, TimeoutError, h11.ProtocolError) as error:
            logger.debug("a probe's connection ended early: %r", error)
        finally:
            self._connections -= 1
            writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request and its answer; then the connection is closed."""
        protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=READ_BYTES)
        while (event := protocol.next_event()) is h11.NEED_DATA:
            protocol.receive_data(await reader.read(READ_BYTES))
        if not isinstance(event, h11.Request):
            return
        answer = self._answer(event)
        headers = [
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.content))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
        content = b"" if event.method == b"HEAD" else answer.content
        pieces = [
            protocol.send(h11.Response(status_code=answer.status, headers=headers)),
            protocol.send(h11.Data(data=content)),
        ]
        writer.write(b"".join(piece for piece in pieces if piece))
        await writer.drain()
        writer.write_eof()
        with contextlib.suppress(OSError):
            await reader.read(READ_BYTES)  # until it has read the answer, or goes

    def _answer(self, request: h11.Request) -> Answer:
        if request.method not in (b"GET", b"HEAD"):
            return Answer(b"only GET is answered here\n", 405)
        path, _, query = request.target.decode(errors="replace").partition("?")
        if path not in self._answers:
            return Answer(f"there is only {', '.join(sorted(self._answers))}\n".encode(), 404)
        try:
            return self._answers[path](dict(parse_qsl(query, keep_blank_values=True)))
        except Exception:  # the edge of the process: a defect must not look like a dead sidecar
            logger.exception("a defect in the answer to %s", path)
            return Answer(b"a defect in the sidecar; see its log\n", 500)
