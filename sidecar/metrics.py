"""Prometheus metrics, in a registry of their own; ``cli`` drops SGLang's multiprocess settings before this is imported.

Invariant: label values are few and fixed (states, phases, reasons, the first 64 ranks); update ids and versions are
never labels. What can be derived is read when it is asked for, so nothing here can be out of date.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sidecar import __version__
from sidecar.engine.info import EngineInfo
from sidecar.errors import Reason
from sidecar.standing import SidecarState
from sidecar.update import LoadPath, Phase, Update, UpdateState
from sidecar.v1 import weight_sync_pb2 as pb

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each counter, that nobody asks for
CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
MAX_RANKS = 64
DEFECT = "DEFECT"
"""In place of a reason: an error that is none of the tree."""
REASONS = frozenset(map(str, Reason)) | {DEFECT}
METHODS = frozenset(pb.DESCRIPTOR.services_by_name["WeightSyncService"].methods_by_name)
OTHER = "other"
"""In place of the names of other services' methods."""


class Observed(Protocol):
    """What is read at the moment of a scrape: the coordinator, and what it knows of its engine."""

    @property
    def state(self) -> SidecarState:
        """In one word."""

    @property
    def ready(self) -> bool:
        """As probes see it."""

    @property
    def engine(self) -> EngineInfo | None:
        """None while it cannot be reached."""

    @property
    def epoch(self) -> int:
        """Of the engine's lives."""

    @property
    def weight_version(self) -> str:
        """Empty while there is no one version."""

    @property
    def in_hand_s(self) -> float:
        """Age of the update in hand; 0 without one."""


class Metrics:
    """What a scraper sees."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._updates = self._counter("updates", "Updates that ended, by outcome.", "outcome")
        self._load_paths = self._counter("load_path", "Committed updates, by how the engine loaded them.", "path")
        self._refusals = self._counter("refusals", "Calls that were refused or failed, by reason.", "reason")
        self._calls = self._counter("calls", "Calls that were answered.", "method", "code")
        self._bytes = self._counter("loaded_bytes", "Bytes that engines' ranks have loaded.")
        self._buckets = self._counter("buckets", "Buckets that engines have loaded.")
        self._seconds = self._histogram("update_seconds", "From the first rank's arrival to an update's end.")
        self._phases = self._histogram("phase_seconds", "Time that an update spent in a phase.", "phase")
        self._pause = self._histogram(
            "pause_seconds", "Generation held for one update, from the call of pause to the end of resume."
        )
        self._waits = Summary(
            "weightsync_rank_wait_seconds",
            "How long the first rank of an update waited for this one.",
            ["rank"],
            registry=self.registry,
        )
        self._open = Gauge("weightsync_open_calls", "Calls in hand.", registry=self.registry)
        self._committed = Gauge(
            "weightsync_last_commit_timestamp_seconds", "When an update committed; 0: never.", registry=self.registry
        )
        self._present = _Present()
        self.registry.register(self._present)
        self._begin_at_zero()

    def watch(self, observed: Observed) -> None:
        """Read what stands now from ``observed``; before this, all of it is at rest."""
        self._present.observed = observed

    def ended(self, update: Update) -> None:
        """Count one update."""
        self._updates.labels(update.state.name.lower()).inc()
        if update.state is UpdateState.COMMITTED:
            self._seconds.observe(max(0.0, update.ended_at - update.started))
        for phase, seconds in update.phase_seconds.items():
            self._phases.labels(phase.name.lower()).observe(seconds)
        if update.held_s is not None:
            self._pause.observe(update.held_s)
        for rank, delivery in update.deliveries.items():
            self._waits.labels(str(rank) if rank < MAX_RANKS else f"{MAX_RANKS}+").observe(
                max(0.0, delivery.joined_at - update.started)
            )
        self._loaded(update)

    def _loaded(self, update: Update) -> None:
        loaded = update.manifest.buckets[: update.num_loaded]
        self._buckets.inc(len(loaded))
        self._bytes.inc(sum(bucket.size_bytes for bucket in loaded) * update.num_engine_ranks)
        if update.state is UpdateState.COMMITTED:
            self._committed.set_to_current_time()
            if update.load_path is not LoadPath.NOT_LOADED:
                self._load_paths.labels(update.load_path.name.lower()).inc()

    def call_began(self) -> None:
        """One more in hand."""
        self._open.inc()

    def call_ended(self, method: str, code: str, reason: str = "") -> None:
        """One less; ``reason`` of one that was refused: one of ``Reason``, or ``DEFECT``."""
        self._open.dec()
        self._calls.labels(method if method in METHODS else OTHER, code).inc()
        if reason:
            self._refusals.labels(reason if reason in REASONS else DEFECT).inc()

    def exposition(self) -> bytes:
        """As text for a scraper, of type ``CONTENT_TYPE``."""
        return generate_latest(self.registry)

    def _begin_at_zero(self) -> None:
        """A counter that appears with its first event has no rate for it."""
        for state in UpdateState:
            if state.ended:
                self._updates.labels(state.name.lower())
        for phase in Phase:
            self._phases.labels(phase.name.lower())
        for path in LoadPath:
            if path is not LoadPath.NOT_LOADED:
                self._load_paths.labels(path.name.lower())
        for reason in REASONS:
            self._refusals.labels(reason)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"weightsync_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"weightsync_{name}", text, labels, buckets=BUCKETS_S, registry=self.registry)


class _Present(Collector):
    """What stands now."""

    def __init__(self) -> None:
        self.observed: Observed | None = None

    def collect(self) -> Iterable[Metric]:
        """Every family, also before there is anything to see."""
        now = self.observed
        engine = now.engine if now else None
        yield _one("ready", "1 while the engine serves one version and updates are welcome.", bool(now and now.ready))
        yield _one("engine_reachable", "1 while the engine answers.", engine is not None)
        yield _one("engine_epoch", "Lives of the engine that were seen.", now.epoch if now else 0)
        yield _one("weight_version", "What the engine serves; NaN unless it is a decimal number.", _version(now))
        yield _one("update_in_hand_seconds", "Age of the update in hand; 0 without one.", now.in_hand_s if now else 0.0)
        yield from _labelled(now, engine)


def _labelled(now: Observed | None, engine: EngineInfo | None) -> Iterator[Metric]:
    states = GaugeMetricFamily("weightsync_state", "1 for the present state.", labels=["state"])
    present = now.state if now else SidecarState.ENGINE_UNREACHABLE
    for state in SidecarState:
        states.add_metric([state.name.lower()], float(state is present))
    yield states
    labels = ["sidecar_version", "engine_version", "dialect"]
    info = GaugeMetricFamily("weightsync_info", "Releases; empty while the engine is not there.", labels=labels)
    info.add_metric([__version__, engine.version if engine else "", engine.dialect.name if engine else ""], 1.0)
    yield info


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"weightsync_{name}", text, value=float(value))


def _version(now: Observed | None) -> float:
    """A number that can be drawn, and compared over a fleet."""
    text = now.weight_version if now else ""
    return float(text) if text.isascii() and text.isdigit() and len(text) <= 15 else float("nan")
