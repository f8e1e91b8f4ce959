"""Errors out: the one place where the error tree becomes gRPC status.

Invariant: a caller gets a code, one sentence and one ErrorInfo, or, for a defect of ours, an incident number; never
a traceback or an exception's own text.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from sidecar.errors import SyncError

logger = logging.getLogger(__name__)

ERROR_DOMAIN = "sglang-weight-sync"
# Details travel as metadata, which peers limit to 8 KiB.
MAX_DETAIL = 512
MAX_MESSAGE = 1500

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary call of this server; each method's behaviour once, since gRPC asks anew for every call."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Give the call's behaviour an edge at which errors are mapped."""
        method = handler_call_details.method
        if known := self._handlers.get(method):
            return known
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        self._handlers[method] = grpc.unary_unary_rpc_method_handler(
            _mapped(handler.unary_unary, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return self._handlers[method]


def _mapped(behaviour: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except SyncError as error:
            logger.info("%s refused: %s %s", method, error.reason, error.message)
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:  # the edge of the process: nothing of a defect's text may leave it
            incident = uuid.uuid4().hex[:8]
            logger.exception("%s: a defect in the sidecar, incident %s", method, incident)
            await context.abort(grpc.StatusCode.INTERNAL, f"a defect in the sidecar; its log has incident {incident}")

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: SyncError) -> NoReturn:
    info = ErrorInfo(
        reason=error.reason,
        domain=ERROR_DOMAIN,
        metadata={name: value[:MAX_DETAIL] for name, value in error.details.items()},
    )
    detail = AnyMessage()
    detail.Pack(info)
    status = rpc_status.to_status(
        Status(code=error.status.value[0], message=error.message[:MAX_MESSAGE], details=[detail])
    )
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort always raises")
