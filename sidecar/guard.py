"""The gate of every call: who may make it, and how many may be open at a time.

Stands inside ``interceptors``, which maps what is raised here. Invariant: no method's code runs for a caller that may
not call it; health answers whatever else is going on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sidecar import access
from sidecar.access import Caller, Role
from sidecar.config import AccessRules
from sidecar.errors import InvalidRequest, LimitExceeded, Reason, SyncError
from sidecar.identity import CALLER
from sidecar.interceptors import Context, Handler, WrappingInterceptor
from sidecar.tracing import TRACE, trace_of

MAX_STREAMS = 16
"""Of reflection; they count apart, so that who may only look keeps nobody from updating."""


class Guard(WrappingInterceptor):
    """Puts every method but those of health behind its gate."""

    def __init__(self, rules: AccessRules, max_open_calls: int) -> None:
        super().__init__()
        self._rules = rules
        self._max_open = max_open_calls
        self._open = 0
        self._streams = 0

    def wrapped(self, handler: Handler, method: str) -> Handler:
        """Requests come as bytes: what a stranger sends is not even parsed."""
        if access.needed(method) is Role.NOBODY:
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, handler.request_deserializer, method),
                response_serializer=handler.response_serializer,
            )
        assert handler.stream_stream is not None, "the one stream is reflection's"
        return grpc.stream_stream_rpc_method_handler(
            self._stream(handler.stream_stream, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(
        self, behaviour: Callable[..., Any], parse: Callable[[bytes], Any] | None, method: str
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: bytes, context: Context) -> Any:
            CALLER.set(self._admit(method, context).name)
            TRACE.set(trace_of(context.invocation_metadata() or ()))
            if self._open >= self._max_open:
                message = f"{self._open} calls are open, as many as --max-open-calls allows; try again later"
                raise LimitExceeded(Reason.TOO_MANY_CALLS, message, openCalls=self._open)
            self._open += 1
            try:
                return await behaviour(_parsed(request, parse, method), context)
            finally:
                self._open -= 1

        return call

    def _stream(self, behaviour: Callable[..., Any], method: str) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def call(requests: Any, context: Context) -> AsyncIterator[Any]:
            try:
                self._admit(method, context)
            except SyncError as error:
                await context.abort(error.status, error.message)
            if self._streams >= MAX_STREAMS:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_STREAMS} streams are open; try later")
            self._streams += 1
            try:
                async for response in behaviour(requests, context):
                    yield response
            finally:
                self._streams -= 1

        return call

    def _admit(self, method: str, context: Context) -> Caller:
        proven: Any = context.auth_context()
        return access.admit(self._rules, method, context.invocation_metadata() or (), proven)


def _parsed(request: bytes, parse: Callable[[bytes], Any] | None, method: str) -> Any:
    try:
        return parse(request) if parse else request
    except DecodeError:
        message = f"{method.rpartition('/')[2]}: the bytes sent are no request of this protocol"
        raise InvalidRequest(Reason.NOT_A_MESSAGE, message) from None
