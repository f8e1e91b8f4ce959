"""The scripted engine on an event loop: as many of them in one process as there are sidecars beside them.

What it answers is the scripted engine's (``tests.fakes``), which serves each connection in a thread of its own: 256 of
those would be measured instead of the update. Invariant: nothing here waits, but for the load of an engine that was
made slow, which holds up no other one.
"""

import asyncio
import time
from http import HTTPStatus
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from tests.fakes.calls import Call, Reply
from tests.fakes.dialects import EngineDialect
from tests.fakes.engine_life import EngineLife, Settings
from tests.fakes.groups import RECEIVE
from tests.fakes.replay import ReplayScript
from tests.fakes.schema import complaint
from tests.fakes.scripted_engine import CHECKPOINT

RELEASE = "0.5.23"
HEAD_ENDS = b"\r\n\r\n"


class LoopEngine:
    """One engine of one rank, at a port that the system chooses."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @classmethod
    async def start(cls, slow_s: float = 0.0) -> Self:
        """Serve; every bucket takes ``slow_s`` longer to load."""
        script = _Script()
        server = await asyncio.get_running_loop().create_server(lambda: _Http(script, slow_s), "127.0.0.1", 0)
        return cls(server)

    def close(self) -> None:
        """Take no connection any more."""
        self._server.close()


class _Script:
    """One life of the scripted engine, which nothing goes wrong in."""

    def __init__(self) -> None:
        self._dialect = EngineDialect(RELEASE)
        self._life = EngineLife(
            Settings(
                dialect=self._dialect,
                tp_size=1,
                device="cpu",
                token_s=0.0,
                checkpoint=CHECKPOINT,
                known_names=None,
                custom_loaders=(),
                replay=ReplayScript(),
                server_info={},
            )
        )

    def reply(self, call: Call) -> Reply:
        route = self._life.route(call)
        if isinstance(route, Reply):
            return route
        refusal = complaint(call, self._dialect.has_sessions, self._dialect.lora_by_rank)
        return refusal or self._life.act(call, route, _nothing, None)


class _Http(asyncio.Protocol):
    """One connection: HTTP/1.1 with keep-alive, one request at a time, as a sidecar sends them."""

    def __init__(self, script: _Script, slow_s: float) -> None:
        self._script = script
        self._slow_s = slow_s
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (call := self._call()) is not None:
            answer = _written(self._script.reply(call))
            if self._slow_s and call.path == RECEIVE:
                asyncio.get_running_loop().call_later(self._slow_s, self._send, answer)
            else:
                self._send(answer)

    def _call(self) -> Call | None:
        """The next request, once all of it is here."""
        head_ends = self._received.find(HEAD_ENDS)
        if head_ends < 0:
            return None
        first, *lines = self._received[:head_ends].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        begins = head_ends + len(HEAD_ENDS)
        ends = begins + int(headers.get("content-length", 0))
        if len(self._received) < ends:
            return None
        body = bytes(self._received[begins:ends])
        del self._received[:ends]
        method, target, _ = first.split(" ")
        url = urlsplit(target)
        return Call(method, url.path, dict(parse_qsl(url.query)), headers, body, time.monotonic())

    def _send(self, answer: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(answer)


def _written(reply: Reply) -> bytes:
    kind = f"content-type: {reply.content_type}\r\n" if reply.content_type else ""
    head = (
        f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\n{kind}content-length: {len(reply.body)}\r\n\r\n"
    )
    return head.encode("latin-1") + reply.body


def _nothing() -> None:
    """What goes before an ordinary call."""
