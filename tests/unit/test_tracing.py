"""Traces through an update: passed on verbatim, or with spans of the sidecar's own in between."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from sidecar.tracing import TRACE, Spans, spans_of, trace_of

SENT = f"00-{'a' * 32}-{'b' * 16}-01"
FIELDS = {"update_id": "u", "version": "7"}


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest.fixture
def spans(exported: InMemorySpanExporter) -> Spans:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    return Spans(provider.get_tracer("test"))


async def apply(spans: Spans, trace: str, error: Exception | None = None) -> dict[str, str]:
    """One update with one phase; by where it was read, the trace that a call to the engine would carry."""
    seen = {}
    now = time.monotonic()
    with spans.update(trace, FIELDS, now - 2.0, now - 1.0) as tell:
        try:
            with spans.phase("load", FIELDS):
                seen["load"] = TRACE.get()
                if error:
                    raise error
        except RuntimeError as failure:
            tell("failed", str(failure))
        else:
            tell("committed", "")
        seen["update"] = TRACE.get()
    return seen


def by_name(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exported.get_finished_spans()}


def test_without_opentelemetry_a_trace_is_passed_on_as_it_came() -> None:
    assert asyncio.run(apply(Spans(), SENT)) == {"load": SENT, "update": SENT}
    assert TRACE.get() == ""


def test_an_update_and_its_phases_are_spans_between_the_trainers_and_the_engines(
    spans: Spans, exported: InMemorySpanExporter
) -> None:
    seen = asyncio.run(apply(spans, SENT))
    names = by_name(exported)
    assert names.keys() == {"weight_sync.update", "weight_sync.collect", "weight_sync.load"}
    update = names["weight_sync.update"]
    assert update.parent is not None
    assert (f"{update.parent.trace_id:032x}", f"{update.parent.span_id:016x}") == ("a" * 32, "b" * 16)
    assert update.attributes == {
        "weight_sync.update_id": "u", "weight_sync.version": "7", "weight_sync.outcome": "committed"
    }  # fmt: skip
    for name in ("weight_sync.collect", "weight_sync.load"):
        parent = names[name].parent
        assert parent is not None
        assert parent.span_id == update.context.span_id
    assert seen["load"] == f"00-{'a' * 32}-{names['weight_sync.load'].context.span_id:016x}-01"
    assert seen["update"] == f"00-{'a' * 32}-{update.context.span_id:016x}-01"


def test_a_span_takes_as_long_as_what_it_is_of(spans: Spans, exported: InMemorySpanExporter) -> None:
    asyncio.run(apply(spans, SENT))
    seconds = {name: ((span.end_time or 0) - (span.start_time or 0)) / 1e9 for name, span in by_name(exported).items()}
    assert seconds["weight_sync.update"] == pytest.approx(2.0, abs=0.5)
    assert seconds["weight_sync.collect"] == pytest.approx(1.0, abs=0.1)


def test_what_breaks_off_is_marked_where_it_did(spans: Spans, exported: InMemorySpanExporter) -> None:
    asyncio.run(apply(spans, "", RuntimeError("the engine died")))
    names = by_name(exported)
    assert names["weight_sync.update"].parent is None
    for name in ("weight_sync.update", "weight_sync.load"):
        assert (names[name].status.status_code, names[name].status.description) == (StatusCode.ERROR, "the engine died")


def test_an_update_that_was_only_collected_is_a_span_too(spans: Spans, exported: InMemorySpanExporter) -> None:
    spans.never_applied(SENT, FIELDS, time.monotonic() - 1.0, "aborted", "rank 1 is missing")
    (span,) = exported.get_finished_spans()
    assert span.context.trace_id == int("a" * 32, 16)
    assert (span.attributes or {})["weight_sync.outcome"] == "aborted"
    assert TRACE.get() == ""


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"},
        {"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_no_spans_are_made_unless_they_are_asked_for(environ: dict[str, str]) -> None:
    assert not spans_of(environ).are_made


def test_the_environment_names_the_exporter() -> None:
    assert spans_of({"OTEL_TRACES_EXPORTER": "console"}).are_made


def test_an_exporter_that_is_not_installed_costs_the_spans_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert not spans_of({"OTEL_TRACES_EXPORTER": "of-nobody"}).are_made
    assert "no installed package offers the exporter 'of-nobody'" in caplog.text


@pytest.mark.parametrize(
    "sent",
    [
        SENT.upper(),
        SENT + "-00",
        SENT + "\n",
        SENT.encode(),
        "",
        f"00-{'0' * 32}-{'b' * 16}-01",
        SENT.replace("00", "ff"),
    ],
)
def test_what_has_not_the_form_of_a_trace_is_none(sent: str | bytes) -> None:
    assert trace_of([("traceparent", sent)]) == ""


def test_a_trace_is_found_among_other_metadata() -> None:
    assert trace_of([("user-agent", "x"), ("traceparent", SENT)]) == SENT
