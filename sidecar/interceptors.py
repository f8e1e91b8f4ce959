"""Errors out: the one place where the error tree becomes gRPC status; and every call counted.

Invariant: a caller gets a code, one sentence and one ErrorInfo, or, for a defect of ours, an incident number; never
a traceback or an exception's own text. It fits into the metadata that peers take, whatever is in a trainer's names.
"""

from __future__ import annotations

import logging
import uuid
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, Protocol, TypeAlias
from urllib.parse import quote

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from sidecar.errors import SyncError

logger = logging.getLogger(__name__)

ERROR_DOMAIN = "sglang-weight-sync"
# Details and message travel as metadata, which peers limit to 8 KiB; the message twice, once percent-encoded.
MAX_DETAIL = 512
MAX_DETAILS_BYTES = 1600
MAX_MESSAGE = 1500
MAX_ENCODED = 3000
PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CallCounts(Protocol):
    """Who counts calls."""

    def call_began(self) -> None:
        """One more in hand."""

    def call_ended(self, method: str, code: str, reason: str = "") -> None:
        """One less."""


class NotCounted:
    """Nobody does."""

    def call_began(self) -> None:
        """Not counted."""

    def call_ended(self, method: str, code: str, reason: str = "") -> None:
        """Not counted."""


class WrappingInterceptor(grpc.aio.ServerInterceptor):
    """Gives each method's behaviour what ``wrapped`` puts around it; once, since gRPC asks anew for every call."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    @abstractmethod
    def wrapped(self, handler: Handler, method: str) -> Handler:
        """The handler in place of ``handler``, or itself."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Called by gRPC for every call."""
        method = handler_call_details.method
        if known := self._handlers.get(method):
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        self._handlers[method] = self.wrapped(handler, method)
        return self._handlers[method]


class ErrorInterceptor(WrappingInterceptor):
    """Gives every unary call an edge at which errors are mapped."""

    def __init__(self, counts: CallCounts | None = None) -> None:
        super().__init__()
        self._counts = counts or NotCounted()

    def wrapped(self, handler: Handler, method: str) -> Handler:
        """Streams are left as they are."""
        if handler.unary_unary is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            self._mapped(handler.unary_unary, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _mapped(self, behaviour: Callable[..., Any], method: str) -> Callable[[Any, Context], Awaitable[Any]]:
        name = method.rpartition("/")[2]

        async def call(request: Any, context: Context) -> Any:
            code, reason = "CANCELLED", ""
            self._counts.call_began()
            try:
                response = await behaviour(request, context)
                code = "OK"
                return response
            except SyncError as error:
                code, reason = error.status.name, str(error.reason)
                logger.info("%s refused: %s", name, error.message, extra=_log_fields(error))
                await _abort(context, error)
            except grpc.aio.AbortError:
                code = context.code().name if context.code() else "UNKNOWN"
                raise
            except Exception:  # the edge of the process: nothing of a defect's text may leave it
                code, reason, incident = "INTERNAL", "DEFECT", uuid.uuid4().hex[:8]
                logger.exception("%s: a defect in the sidecar, incident %s", method, incident)
                said = f"a defect in the sidecar; its log has incident {incident}"
                await context.abort(grpc.StatusCode.INTERNAL, said)
            finally:
                self._counts.call_ended(name, code, reason)

        return call


async def _abort(context: Context, error: SyncError) -> NoReturn:
    detail = AnyMessage()
    detail.Pack(ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=_fitting(error.details)))
    status = rpc_status.to_status(Status(code=error.status.value[0], message=_cut(error.message), details=[detail]))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort always raises")


def _log_fields(error: SyncError) -> dict[str, object]:
    """What the error says of itself, by the names of ``logs.FIELDS``."""
    named = {"update_id": "updateId", "version": "version", "rank": "rank", "bucket": "bucket", "phase": "phase"}
    told = {field: error.details[name] for field, name in named.items() if name in error.details}
    return {**told, "reason": str(error.reason)}


def _fitting(details: dict[str, str]) -> dict[str, str]:
    """As many bytes as there is room for: values in the order in which they were told."""
    room, fitting = MAX_DETAILS_BYTES, {}
    for name, value in details.items():
        kept = value[:MAX_DETAIL].encode()[: max(0, room)].decode(errors="ignore")
        room -= len(name) + len(kept.encode())
        fitting[name] = kept
    return fitting


def _cut(message: str) -> str:
    """Shortened until it fits also as gRPC encodes it."""
    message = message[:MAX_MESSAGE]
    while len(quote(message, safe=PLAIN)) > MAX_ENCODED:
        message = message[: len(message) * 3 // 4]
    return message
