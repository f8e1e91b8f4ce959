"""One request, in process or through a socket, and what is wrong with its answer, if anything."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, NoReturn, cast
from urllib.parse import quote

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from sidecar import errors
from sidecar.errors import Reason
from sidecar.interceptors import ERROR_DOMAIN
from sidecar.servicer import SERVICE_NAME
from tests.fuzz.scenarios import Request
from tests.fuzz.world import World

SLACK_S = 10.0
"""Beside a caller's own time: for an engine step that was begun, on machines with little to spare."""
DETAILS_KEY = "grpc-status-details-bin"
MAX_TRAILERS = 8 << 10
"""What gRPC's peers take of metadata: of more they drop some answers, and from twice as much on all."""
FOR_INTERNAL = {Reason.UPDATE_FAILED, Reason.ENGINE_LOST, Reason.ENGINE_TIMEOUT}
CANCELLED = "cancelled"


def _statuses(kind: type[errors.SyncError]) -> set[grpc.StatusCode]:
    return {kind.status}.union(*map(_statuses, kind.__subclasses__()))


STATUSES = _statuses(errors.SyncError)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended."""

    outcome: str
    """A status code's name and a reason, or what else became of it."""
    seconds: float
    finding: str = ""
    """What must not have happened; empty if nothing."""


class CallContext:
    """What a handler asks of gRPC: the time that is left, and a way to end with an error."""

    def __init__(self, budget_s: float) -> None:
        self._until = time.monotonic() + budget_s
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailers: tuple[tuple[str, bytes], ...] = ()

    def time_remaining(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        self.code, self.details, self.trailers = code, details, tuple(trailing_metadata)
        raise grpc.aio.AbortError


async def call(world: World, request: Request) -> Answer:
    """Send it, and judge what comes back."""
    started = time.monotonic()
    send = _by_socket if request.by_socket else _in_process
    work = asyncio.create_task(send(world, request))
    if request.cancel_s is not None:
        await asyncio.wait([work], timeout=request.cancel_s)
        work.cancel()
    done, _ = await asyncio.wait([work], timeout=request.budget_s + SLACK_S)
    seconds = time.monotonic() - started
    if not done:
        work.cancel()
        return Answer("no answer", seconds, f"no answer within {request.budget_s + SLACK_S:.0f} s")
    if work.cancelled():
        return Answer(CANCELLED, seconds)
    error = work.exception()
    if error is not None:
        return Answer("exception", seconds, f"{type(error).__name__}: {str(error)[:200]}")
    outcome, finding = work.result()
    return Answer(outcome, seconds, finding)


async def _in_process(world: World, request: Request) -> tuple[str, str]:
    handler, context = cast("Any", world.handlers[request.method]), CallContext(request.budget_s)
    _note(world, request)
    try:
        response = await handler.unary_unary(request.wire, context)
    except grpc.aio.AbortError:
        assert context.code is not None
        return _judged(context.code, context.details, dict(context.trailers).get(DETAILS_KEY, b""))
    handler.response_serializer(response)
    return "OK", ""


def _note(world: World, request: Request) -> bool:
    """Remember what was said, for the look at the engine's bodies; whether it was a message at all."""
    try:
        world.bodies.said.note(world.parsers[request.method](request.wire))
    except DecodeError:
        return False
    return True


async def _by_socket(world: World, request: Request) -> tuple[str, str]:
    assert world.channel is not None
    is_message = _note(world, request)
    method: Any = world.channel.unary_unary(f"/{SERVICE_NAME}/{request.method}")
    try:
        await method(request.wire, timeout=request.budget_s + SLACK_S / 2)
    except grpc.aio.AioRpcError as error:
        return _judged_from_afar(error)
    return "OK", "" if is_message else "an answer to what is no message"


def _judged_from_afar(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    details = {key: value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY}
    packed = details.get(DETAILS_KEY, b"")
    return _judged(error.code(), error.details() or "", packed if isinstance(packed, bytes) else packed.encode())


def _judged(code: grpc.StatusCode, message: str, packed: bytes) -> tuple[str, str]:
    """The outcome's name, and what is wrong with it: it must be an error of the documented tree."""
    if not packed:
        return code.name, f"{code.name} without details: {message[:200]!r}"
    status, info = Status.FromString(packed), ErrorInfo()
    outcome = f"{code.name} {info.reason}"
    if len(status.details) != 1 or not status.details[0].Unpack(info):
        return outcome, "not exactly one ErrorInfo"
    outcome = f"{code.name} {info.reason}"
    if _is_too_long(message, status, packed):
        return outcome, f"an error too long for gRPC's metadata: {len(message)} characters"
    return outcome, _wrong_with(code, message, status, info)


def _wrong_with(code: grpc.StatusCode, message: str, status: Status, info: ErrorInfo) -> str:
    if info.reason not in set(Reason) or info.domain != ERROR_DOMAIN or code not in STATUSES:
        return f"not of the tree of errors: {code.name} {info.reason} {info.domain}"
    if code is grpc.StatusCode.INTERNAL and info.reason not in FOR_INTERNAL:
        return f"INTERNAL for {info.reason}"
    if "a defect in the sidecar" in message:
        return f"a defect: {message[:200]}"
    if (status.code, status.message) != (code.value[0], message) or not message:
        return "the details say something else than the status"
    return ""


def _is_too_long(message: str, status: Status, packed: bytes) -> bool:
    """A message travels percent-encoded, and metadata in base64; a peer drops an answer with too much of them."""
    longest = max(message, status.message, key=len)
    size = len(quote(longest, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")) + len(packed) * 4 // 3
    return size > MAX_TRAILERS - 512
