"""One connection to the engine: what is sent, once, and what each way of failing is called."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from sidecar.engine import http
from sidecar.engine.http import EngineHttp
from sidecar.errors import EngineDown, EngineError, EngineLost, EngineRefused, EngineTimeout, EngineUnreachable

LIMIT_S = 10.0
SUCCESS = b'{"success":true}'


@dataclass
class Server:
    """Answers every request alike, and keeps what came, with the number of its connection."""

    answer: bytes
    requests: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    num_connections: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with closing(writer):
            while head := await self._head(reader):
                self.requests.append(head)
                self.bodies.append(await reader.readexactly(_content_length(head)))
                writer.write(self.answer)
                if not self.answer.startswith(b"HTTP/1.1"):
                    return

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return b""


def _content_length(head: bytes) -> int:
    lines = head.decode().lower().split("\r\n")
    return next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)


def reply(status: str, body: bytes = SUCCESS, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def play(
    story: Callable[[EngineHttp, Server], Awaitable[None]], answer: bytes = reply("200 OK"), url: str = "http://{}"
) -> Server:
    """Run ``story`` against a server that always gives this answer."""

    async def run() -> Server:
        server = Server(answer)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = url.format(f"127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        async with listening:
            with closing(EngineHttp(server.url)) as engine:
                await story(engine, server)
        return server

    return asyncio.run(run())


def failure(engine: EngineHttp, timeout_s: float = LIMIT_S) -> EngineError:
    """How a POST fails that must."""
    with closing(engine), pytest.raises(EngineError) as caught:
        asyncio.run(engine.post("/begin", {}, timeout_s))
    return caught.value


def test_calls_share_one_connection_and_bodies_are_compact() -> None:
    async def story(engine: EngineHttp, _: Server) -> None:
        await engine.post("/pause", {"mode": "retract", "n": [1, 2]}, LIMIT_S)
        assert await engine.get("/info", LIMIT_S) == {"success": True}
        assert await engine.ask("/look", {}, LIMIT_S) == {"success": True}
        assert await engine.status("/ready", LIMIT_S) == 200

    server = play(story)
    assert server.num_connections == 1
    assert server.bodies == [b'{"mode":"retract","n":[1,2]}', b"", b"{}", b""]
    assert [request.split(b" HTTP")[0] for request in server.requests] == [
        b"POST /pause",
        b"GET /info",
        b"POST /look",
        b"GET /ready",
    ]
    assert b"Content-Type: application/json" in server.requests[0]


def test_a_connection_that_was_idle_for_long_is_not_used_again() -> None:
    async def story(engine: EngineHttp, _: Server) -> None:
        for _repeat in range(2):
            await engine.post("/pause", {}, LIMIT_S)
            engine._last_used -= http.MAX_IDLE_S + 0.1
            await engine.post("/pause", {}, LIMIT_S)

    assert play(story).num_connections == 3


def test_a_path_in_the_url_goes_in_front() -> None:
    async def story(engine: EngineHttp, _: Server) -> None:
        await engine.post("/flush_cache?timeout=0.500", {}, LIMIT_S)

    (request,) = play(story, url="http://{}/engines/7/").requests
    assert request.startswith(b"POST /engines/7/flush_cache?timeout=0.500 HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply("400 Bad Request", b'{"success":false,"message":"not  now"}'), "answered 400 to /x: not now"),
        (reply("400 Bad Request", b'{"error_message":"no"}'), "answered 400 to /x: no"),
        (reply("422 Unprocessable", b'{"detail":[]}'), "answered 422 to /x: {'detail': []}"),
        (reply("500 Oh", b"plain \xff words"), "answered 500 to /x: plain \ufffd words"),
        (reply("503 No", b""), "answered 503 to /x: "),
        (reply("400 Long", b"y" * 5000), "answered 400 to /x: " + "y" * http.MAX_MESSAGE),
    ],
    ids=["message", "error-message", "object", "text", "empty", "long"],
)
def test_a_refusal_has_the_servers_own_words(answer: bytes, words: str) -> None:
    async def story(engine: EngineHttp, server: Server) -> None:
        with pytest.raises(EngineRefused) as caught:
            await engine.post("/x", {}, LIMIT_S)
        assert caught.value.message == f"the engine at {server.url} {words}"

    play(story, answer)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_refusal_that_names_the_other_place_and_nothing_is_sent_there(status: int) -> None:
    async def story(engine: EngineHttp, server: Server) -> None:
        with pytest.raises(EngineRefused, match=f"answered {status} to /x: it is to be found at /elsewhere"):
            await engine.post("/x", {"weights": 1}, LIMIT_S)
        assert await engine.status("/ready", LIMIT_S) == status
        assert len(server.requests) == 2

    play(story, reply(f"{status} Moved", b"", "Location: /elsewhere"))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"\xff"], ids=["empty", "html", "list", "bytes"])
def test_an_answer_that_is_no_object_is_refused(body: bytes) -> None:
    async def story(engine: EngineHttp, _: Server) -> None:
        await engine.post("/x", {}, LIMIT_S)  # which does not look into it
        with pytest.raises(EngineRefused, match="answered something else than a JSON object"):
            await engine.get("/x", LIMIT_S)

    play(story, reply("200 OK", body))


@pytest.mark.parametrize(
    "answer", [b"", b"no HTTP\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"], ids=["none", "garbage", "half"]
)
def test_a_connection_that_breaks_loses_the_answer_and_the_request_is_not_sent_again(answer: bytes) -> None:
    async def story(engine: EngineHttp, server: Server) -> None:
        half = answer.startswith(b"HTTP")
        with pytest.raises(EngineLost) as caught:
            await engine.post("/x", {}, 0.3 if half else LIMIT_S)
        assert type(caught.value) is (EngineTimeout if half else EngineLost)
        assert "was sent to the engine" in caught.value.message
        assert len(server.requests) == 1

    play(story, answer)


def test_a_connection_that_the_server_has_closed_is_made_anew() -> None:
    async def story(engine: EngineHttp, server: Server) -> None:
        await engine.post("/x", {}, LIMIT_S)
        await engine.post("/x", {}, LIMIT_S)
        assert server.num_connections == 2

    play(story, reply("200 OK", SUCCESS, "Connection: close"))


def test_nobody_who_listens_is_an_engine_that_is_down() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    error = failure(EngineHttp(f"http://127.0.0.1:{port}"))
    assert type(error) is EngineDown
    assert "cannot be reached (connection refused, /begin)" in error.message


@pytest.mark.parametrize("url", ["http://a b:1", "http://127.0.0.1:99999", "http://.a:1", "http://255.255.255.255:1"])
def test_a_place_that_there_is_not_is_an_engine_that_cannot_be_reached(url: str) -> None:
    error = failure(EngineHttp(url))
    assert type(error) is EngineUnreachable
    assert "cannot be reached (no connection, /begin)" in error.message


def test_a_connection_that_is_not_made_in_time_was_never_used() -> None:
    """A server whose queue is full: Linux drops what comes further."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as full:
        address = full.getsockname()
        with closing(socket.create_connection(address)):
            error = failure(EngineHttp(f"http://127.0.0.1:{address[1]}"), timeout_s=0.3)
    assert type(error) is EngineUnreachable
    assert "cannot be reached (no connection in time, /begin)" in error.message


def test_a_server_that_says_nothing_is_waited_for_as_long_as_was_said() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        error = failure(EngineHttp(f"http://127.0.0.1:{silent.getsockname()[1]}"), timeout_s=0.3)
    assert type(error) is EngineTimeout
    assert "no answer within 0.3 s; whether it was carried out is unknown" in error.message


def test_https_is_spoken_where_the_url_says_so() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as plain:
        url = f"https://127.0.0.1:{plain.getsockname()[1]}"

        async def story() -> bytes:
            with closing(EngineHttp(url)) as engine:
                sent = asyncio.create_task(engine.post("/x", {}, 1.0))
                accepted, _ = await asyncio.to_thread(plain.accept)
                with closing(accepted):
                    greeting = await asyncio.to_thread(accepted.recv, 3)  # the loop has yet to say it
                with pytest.raises(EngineError):
                    await sent
                return greeting

        assert asyncio.run(story())[:2] == b"\x16\x03"  # a TLS handshake
