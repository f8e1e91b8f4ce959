"""What one update leaves behind for those who watch: its span, its metrics and its line in the log."""

import asyncio
import logging
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sidecar import history
from sidecar.config import Timeouts
from sidecar.coordinator import Coordinator
from sidecar.errors import SyncError
from sidecar.header import Header
from sidecar.manifest import Manifest
from sidecar.metrics import Metrics
from sidecar.tracing import TRACE, Spans
from sidecar.update import Update
from tests.model.engine import Failure, RuleKeepingEngine

SENT = f"00-{'a' * 32}-{'b' * 16}-01"


class Watched:
    """A coordinator, and everything that looks at its updates."""

    def __init__(self) -> None:
        self.engine = RuleKeepingEngine(1, "0.5.23")
        self.metrics = Metrics()
        self.exported = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exported))
        self.spans = Spans(provider.get_tracer("test"))

    def update(self, *planned: Failure) -> Update:
        """From disk: pause, end what is open, load, flush, publish, resume."""

        async def updated() -> Update:
            coordinator = Coordinator(self.engine, Timeouts(), on_ended=self.metrics.ended, spans=self.spans)
            coordinator.engine_changed()
            await coordinator.engine_info()
            self.engine.planned = list(planned)
            TRACE.set(SENT)
            header = Header(update_id="u", weight_version="7", rank=0, tp_size=1)
            try:
                return await coordinator.update_from_disk(header, "/model", 60.0)
            except SyncError:
                return coordinator.find("u")

        return asyncio.run(updated())

    def counted(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"weightsync_{name}", labels)

    def names(self) -> list[str]:
        return [span.name.removeprefix("weight_sync.") for span in self.exported.get_finished_spans()]


@pytest.fixture
def watched() -> Iterator[Watched]:
    yield (made := Watched())
    made.exported.shutdown()


def test_an_updates_phases_are_spans_in_the_trace_of_its_caller(watched: Watched) -> None:
    assert watched.update().trace == SENT
    assert watched.names() == ["collect", "pause", "load", "flush", "publish", "resume", "update"]
    traces = {span.context.trace_id for span in watched.exported.get_finished_spans()}
    assert traces == {int("a" * 32, 16)}


def test_generation_was_held_from_pause_to_resume(watched: Watched) -> None:
    update = watched.update()
    inside = sum(seconds for phase, seconds in update.phase_seconds.items() if phase.name != "COLLECT")
    assert watched.counted("pause_seconds_sum") == update.held_s == pytest.approx(inside, abs=0.02)


def test_an_update_that_leaves_generation_held_has_no_length_of_that(watched: Watched) -> None:
    update = watched.update(Failure.NONE, Failure.NONE, Failure.LOSE)
    assert (update.state.name, update.held_s) == ("FAILED", None)
    assert watched.counted("pause_seconds_count") == 0
    assert watched.counted("updates_total", outcome="failed") == 1
    broken = {span.name for span in watched.exported.get_finished_spans() if not span.status.is_ok}
    assert {"weight_sync.update", "weight_sync.load"} <= broken


def test_an_update_ends_with_one_line_and_its_fields(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sidecar"):
        watched.update()
    (record,) = [record for record in caplog.records if record.name == "sidecar.in_hand"]
    assert record.getMessage().startswith(
        "update u (version 7): committed, 0 of 0 buckets, 0 bytes per rank; ms: collect"
    )
    assert (record.__dict__["update_id"], record.__dict__["version"]) == ("u", "7")


def test_its_line_says_which_rank_came_last() -> None:
    update = Update(Header(update_id="u", weight_version="7", rank=1, tp_size=2), Manifest(()), "d", started=10.0)
    for rank, joined_at in ((1, 10.0), (0, 10.25)):
        update.join(rank).joined_at = joined_at
    assert "; rank 0 came last, 250.0 ms after the first" in history.sentence(update)
