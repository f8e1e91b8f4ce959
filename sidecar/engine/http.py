"""One HTTP connection to SGLang: bounded calls on the event loop, with every failure named.

Invariant: a request is sent once. ``EngineUnreachable`` means that it never left; ``EngineLost`` that it may have
been carried out; ``EngineRefused`` that the server answered no. Nothing is retried here, and no redirect followed.

On the event loop itself, by h11, since an update is five small calls: one by a thread and urllib3 takes 0.6 ms, one so
0.33 ms, and on a virtual machine, where waking a thread is dear, half a millisecond less.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import certifi
import h11

from sidecar.config import EngineKeys
from sidecar.errors import EngineDown, EngineLost, EngineRefused, EngineTimeout, EngineUnreachable, Reason
from sidecar.tracing import HEADER, TRACE

CONNECT_TIMEOUT_S = 5.0
# SGLang closes connections that were idle for 5 s (uvicorn's keep-alive time-out); one that is about to be closed
# would lose a request, so an older connection is not used again.
MAX_IDLE_S = 2.0
# A schema error echoes the request: keep messages readable.
MAX_MESSAGE = 500
READ_BYTES = 1 << 16
# What SGLang guards with --api-key; --admin-api-key, where there is one, guards all else (srt/utils/auth.py, 0.5.8 and
# later). Never sent to what is open to everybody.
LOOKS = ("/model_info", "/server_info", "/v1/models", "/openapi.json")
OPEN_TO_ALL = ("/ready", "/health")
UNAUTHORIZED = (401, 403)


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer."""

    status: int
    content: bytes
    location: str
    """Where a redirect points; empty for anything else."""
    date: str
    """The server's clock, as it says it; empty if it does not."""


@dataclass(slots=True)
class _Connection:
    """One connection, between two requests or in one."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    protocol: h11.Connection

    def is_usable(self) -> bool:
        """Whether another request may go through it."""
        return self.protocol.our_state is h11.IDLE and not self.reader.at_eof() and not self.writer.is_closing()


class EngineHttp:
    """Keep-alive calls to one server, one at a time."""

    def __init__(self, url: str, keys: EngineKeys | None = None) -> None:
        self.url = url.rstrip("/")
        self._keys = keys or EngineKeys()
        self._connection: _Connection | None = None
        self._turn = asyncio.Lock()
        self._last_used = 0.0

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        """GET ``path``: the answer, which must be a JSON object."""
        return self._json_object(path, await self._request("GET", path, None, timeout_s))

    async def ask(self, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """POST ``body``: the answer, which must be a JSON object."""
        return self._json_object(path, await self._request("POST", path, body, timeout_s))

    async def status(self, path: str, timeout_s: float) -> int:
        """GET ``path``: its status, whatever that is."""
        try:
            return (await self._request("GET", path, None, timeout_s)).status
        except EngineRefused as refusal:
            return int(refusal.details["httpStatus"])

    async def date(self, path: str, timeout_s: float) -> str:
        """GET ``path``: the server's clock as the answer's header has it; empty if it does not say."""
        return (await self._request("GET", path, None, timeout_s)).date

    def _json_object(self, path: str, response: Response) -> dict[str, Any]:
        answer = _json_of(response)
        if not isinstance(answer, dict):
            message = f"{self.url}{path} answered something else than a JSON object; is it an SGLang server?"
            raise EngineRefused(Reason.ENGINE_REFUSED, message, engineUrl=self.url, path=path)
        return answer

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
        """POST ``body``: returns if the answer is a success."""
        await self._request("POST", path, body, timeout_s)

    def close(self) -> None:
        """Let the connection go; a call in flight is lost."""
        if self._connection is not None:
            self._connection.writer.transport.abort()
            self._connection = None

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Response:
        sent = b"" if body is None else await _encoded(body)
        async with self._turn:
            try:
                response = await self._exchange(method, path, sent, timeout_s)
            except BaseException:  # cancelled, too: what is half-way through a connection must not meet the next call
                self.close()
                raise
            finally:
                self._last_used = time.monotonic()
        if not 200 <= response.status < 300:
            raise self._refused(path, response)
        return response

    async def _exchange(self, method: str, path: str, body: bytes, timeout_s: float) -> Response:
        connection = await self._connected(path, min(CONNECT_TIMEOUT_S, timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                connection.writer.write(self._written(connection.protocol, method, path, body))
                await connection.writer.drain()
                return await _read(connection)
        except TimeoutError as error:
            raise self._lost(EngineTimeout, path, f"no answer within {timeout_s:.1f} s") from error
        except (OSError, h11.RemoteProtocolError) as error:
            raise self._lost(EngineLost, path, "the connection broke before an answer came") from error

    async def _connected(self, path: str, timeout_s: float) -> _Connection:
        """The connection of the call before, if it can still be used, or a new one."""
        if self._connection is not None:
            if self._connection.is_usable() and time.monotonic() - self._last_used <= MAX_IDLE_S:
                return self._connection
            self.close()
        try:
            async with asyncio.timeout(timeout_s):
                self._connection = await self._connect()
        except TimeoutError as error:
            raise self._unreachable(EngineUnreachable, path, "no connection in time") from error
        except ConnectionRefusedError as error:
            raise self._unreachable(EngineDown, path, "connection refused") from error
        except (OSError, ValueError, OverflowError) as error:  # no such place, or none that could be
            raise self._unreachable(EngineUnreachable, path, "no connection") from error
        return self._connection

    async def _connect(self) -> _Connection:
        """Past any proxy; asyncio sets TCP_NODELAY itself."""
        parts = urlsplit(self.url)
        context = ssl.create_default_context(cafile=certifi.where()) if parts.scheme == "https" else None
        port = parts.port or (443 if context else 80)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
        return _Connection(reader, writer, h11.Connection(h11.CLIENT))

    def _written(self, protocol: h11.Connection, method: str, path: str, body: bytes) -> bytes:
        """One request, in one piece."""
        parts = urlsplit(self.url)
        headers = [("Host", parts.netloc), ("Accept", "*/*")]
        if method == "POST":
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if trace := TRACE.get():
            headers.append((HEADER, trace))
        if key := self._key(path):
            headers.append(("Authorization", f"Bearer {key}"))
        request = h11.Request(method=method, target=parts.path + path, headers=headers)
        pieces = [protocol.send(request), protocol.send(h11.Data(data=body)), protocol.send(h11.EndOfMessage())]
        return b"".join(piece for piece in pieces if piece)

    def _key(self, path: str) -> str:
        if path in OPEN_TO_ALL:
            return ""
        return self._keys.api.text() if path in LOOKS else self._keys.admin.text() or self._keys.api.text()

    def _unreachable(self, kind: type[EngineUnreachable], path: str, why: str) -> EngineUnreachable:
        message = f"the engine at {self.url} cannot be reached ({why}, {path}); is the SGLang server up?"
        return kind(Reason.ENGINE_UNREACHABLE, message, engineUrl=self.url, path=path)

    def _lost(self, kind: type[EngineLost], path: str, why: str) -> EngineLost:
        message = f"{path} was sent to the engine at {self.url}, but {why}; whether it was carried out is unknown"
        return kind(Reason.ENGINE_LOST, message, engineUrl=self.url, path=path)

    def _refused(self, path: str, response: Response) -> EngineRefused:
        said = _message_of(response)
        message = f"the engine at {self.url} answered {response.status} to {path}: {said}"
        if response.status in UNAUTHORIZED:
            message += f"; it wants {_needed_key(path)}"
        return EngineRefused(
            Reason.ENGINE_REFUSED, message, engineUrl=self.url, path=path, httpStatus=response.status, said=said
        )


async def _read(connection: _Connection) -> Response:
    """The answer to what was written; raises ``h11.RemoteProtocolError`` for what is none, or half of one."""
    protocol, content = connection.protocol, bytearray()
    response: h11.Response | None = None
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(await connection.reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            content += event.data
        elif isinstance(event, h11.EndOfMessage):
            break
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("it was closed before an answer")
    assert response is not None, "a message has a beginning"
    if protocol.our_state is h11.DONE and protocol.their_state is h11.DONE:
        protocol.start_next_cycle()
    headers = {name: value.decode(errors="replace") for name, value in response.headers}
    location = headers.get(b"location", "") if 300 <= response.status_code < 400 else ""
    return Response(response.status_code, bytes(content), location, headers.get(b"date", ""))


def _needed_key(path: str) -> str:
    """Which of the sidecar's settings is wrong or missing."""
    if path in LOOKS:
        return "its --api-key: give it to the sidecar as --engine-api-key-file"
    return "its --admin-api-key, or without one its --api-key: --engine-admin-key-file or --engine-api-key-file"


async def _encoded(body: Mapping[str, Any]) -> bytes:
    """Compact JSON; of a large body in a thread, so that the event loop answers meanwhile."""
    return await asyncio.to_thread(_dumped, body) if _is_large(body) else _dumped(body)


def _is_large(body: Mapping[str, Any]) -> bool:
    lists = [value for value in body.values() if isinstance(value, list)]
    return any(isinstance(item, str) and len(item) > READ_BYTES for items in lists for item in items)


def _dumped(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _json_of(response: Response) -> Any:
    """The answer's JSON, or None if it is something else."""
    try:
        return json.loads(response.content)
    except ValueError:
        return None


def _message_of(response: Response) -> str:
    """SGLang's own words: JSON with "message" ("error_message" of adapters), or plain text."""
    if response.location:
        return f"it is to be found at {response.location}: name that server itself"[:MAX_MESSAGE]
    said = _json_of(response) or response.content.decode(errors="replace")
    if isinstance(said, dict):
        said = said.get("message") or said.get("error_message") or said
    return " ".join(str(said).split())[:MAX_MESSAGE]
