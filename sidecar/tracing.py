"""The trace that a call belongs to, from the trainer's span to the engine's: W3C ``traceparent``.

Without OpenTelemetry, or where no ``OTEL_*`` asks for spans, a trainer's ``traceparent`` is passed on verbatim, so that
SGLang's spans (--enable-trace) are children of the trainer's. With it there is a span per update and one per phase in
between. An update belongs to the trace of the first of its calls that brought one. Invariant: what is passed on has the
form of a ``traceparent``, whatever was sent; nothing here can fail an update.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger(__name__)

HEADER = "traceparent"
UPDATE, PHASE = "weight_sync.update", "weight_sync."
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTERS = "opentelemetry_traces_exporter"
"""The group of entry points under which packages offer exporters."""
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

TRACE: ContextVar[str] = ContextVar("trace", default="")
"""Of the call, or the update, that this task works for; empty: none."""

End = Callable[[str, str], None]
"""Tells a span how its update ended, and why if that was not well."""


def trace_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """What a caller sent; empty if that is none."""
    for key, value in metadata:
        if key == HEADER and isinstance(value, str) and _FORM.fullmatch(value):
            return value
    return ""


class Spans:
    """Those of this process. Without a tracer there are none, and traces pass through."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer

    @property
    def are_made(self) -> bool:
        """Whether there will be any."""
        return self._tracer is not None

    @contextmanager
    def update(self, trace: str, fields: Mapping[str, object], since: float, applied: float) -> Iterator[End]:
        """The block applies an update that began ``since`` and was complete when it was ``applied``."""
        TRACE.set(trace)
        span = self._start(UPDATE, fields, since)
        if self._tracer is None or span is None:
            yield lambda outcome, why: None
            return
        with _within(span):
            self._told("collect", fields, since, applied)
            yield lambda outcome, why: _end(span, outcome, why)

    @contextmanager
    def phase(self, name: str, fields: Mapping[str, object]) -> Iterator[None]:
        """The block is one phase of the update in hand."""
        span = self._start(PHASE + name, fields, time.monotonic())
        if span is None:
            yield
            return
        with _within(span):
            yield

    def never_applied(self, trace: str, fields: Mapping[str, object], since: float, outcome: str, why: str) -> None:
        """An update ends that began ``since`` and was only collected."""
        token = TRACE.set(trace)
        if span := self._start(UPDATE, fields, since):
            _end(span, outcome, why)
            span.end()
        TRACE.reset(token)

    def _told(self, name: str, fields: Mapping[str, object], since: float, until: float) -> None:
        if span := self._start(PHASE + name, fields, since):
            span.end(_wall_ns(until))

    def _start(self, name: str, fields: Mapping[str, object], since: float) -> Span | None:
        if self._tracer is None:
            return None
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        trace = TRACE.get()
        parent = TraceContextTextMapPropagator().extract({HEADER: trace} if trace else {})
        attributes = {PHASE + field: str(value) for field, value in fields.items()}
        return self._tracer.start_span(name, parent, attributes=attributes, start_time=_wall_ns(since))


def spans_of(environ: Mapping[str, str]) -> Spans:
    """As ``OTEL_*`` says; none, with a word in the log, if what it asks for is not installed."""
    names = _exporters(environ)
    if not names or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Spans()
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider()
        for name in names:
            provider.add_span_processor(BatchSpanProcessor(_loaded(name)()))
    except Exception as error:  # noqa: BLE001 - whatever an exporter makes of its settings: updates come first
        logger.warning("no spans, though OTEL_* asks for them (is the extra 'otel' installed?): %s", error)
        return Spans()
    return Spans(provider.get_tracer("sglang-weight-sync"))


def _exporters(environ: Mapping[str, str]) -> list[str]:
    """Names of entry points: OTLP where there is an endpoint, unless something else is said."""
    said = environ.get("OTEL_TRACES_EXPORTER", "otlp" if any(map(environ.get, ENDPOINTS)) else "none")
    protocol = next(filter(None, map(environ.get, PROTOCOLS)), "http/protobuf")
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    names = [name.strip() for name in said.split(",")]
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]


def _loaded(name: str) -> Callable[[], SpanExporter]:
    for entry in entry_points(group=EXPORTERS, name=name):
        made: Callable[[], SpanExporter] = entry.load()
        return made
    raise LookupError(f"no installed package offers the exporter {name!r}")


@contextmanager
def _within(span: Span) -> Iterator[None]:
    """Calls of the block are the span's."""
    from opentelemetry.trace import StatusCode

    context = span.get_span_context()
    token = TRACE.set(f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}")
    try:
        yield
    except Exception as error:
        span.set_status(StatusCode.ERROR, str(error))
        raise
    finally:
        TRACE.reset(token)
        span.end()


def _end(span: Span, outcome: str, why: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute(PHASE + "outcome", outcome)
    if why:
        span.set_status(StatusCode.ERROR, why)


def _wall_ns(moment: float) -> int:
    """Of a moment on the monotonic clock."""
    return time.time_ns() - round(1e9 * (time.monotonic() - moment))
