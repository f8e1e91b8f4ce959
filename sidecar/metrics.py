"""Prometheus metrics, in a registry of their own; ``cli`` drops SGLang's multiprocess settings before this is imported.

Invariant: label values are few and fixed (states, phases); update ids, versions and ranks are never labels.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from sidecar.update import Phase, Update, UpdateState

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


class Metrics:
    """What a scraper sees."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._updates = Counter(
            "weightsync_updates", "Updates that ended, by outcome.", ["outcome"], registry=self.registry
        )
        self._phases = Histogram(
            "weightsync_phase_seconds",
            "Time that an update spent in a phase.",
            ["phase"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._ready = Gauge(
            "weightsync_ready", "1 while the engine serves one version and updates are welcome.", registry=self.registry
        )
        for state in UpdateState:
            if state.ended:
                self._updates.labels(state.name.lower())
        for phase in Phase:
            self._phases.labels(phase.name.lower())

    def ended(self, update: Update) -> None:
        """Count one update."""
        self._updates.labels(update.state.name.lower()).inc()
        for phase, seconds in update.phase_seconds.items():
            self._phases.labels(phase.name.lower()).observe(seconds)

    def set_ready(self, ready: bool) -> None:
        """Readiness, as probes see it."""
        self._ready.set(ready)

    def serve(self, port: int) -> None:
        """Plain HTTP on loopback, from a daemon thread of prometheus_client's."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)
