"""What is the same around every peer: the engine's HTTP as its users call it, and a stopwatch by phase.

Invariant: generation is held from the first call to the last one, the prefix cache is flushed once at the end, and
every call has a connection of its own, as ``requests.post`` has it in the peers' code.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import requests

from benchmarks.shapes import NamedTensors

CALL_S = 120.0


@dataclass(slots=True)
class Measured:
    """What one rank saw of one update."""

    phases: dict[str, float] = field(default_factory=dict)
    """Seconds; a phase that comes again is added up."""
    counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is in the block."""
        started = time.monotonic()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - started

    def count(self, name: str, number: int) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + number


class Engine:
    """One server, as rank 0 of a peer calls it."""

    def __init__(self, url: str, *, uses_sessions: bool, measured: Measured) -> None:
        self._url = url
        self._uses_sessions = uses_sessions
        self._measured = measured

    @contextmanager
    def held(self) -> Iterator[None]:
        """Pause generation, open the session where there is one; afterwards end, flush and go on."""
        self._timed("pause", "/pause_generation", {"mode": "retract"})
        if self._uses_sessions:
            self._timed("begin", "/begin_weight_update", {"selector": "all"})
        yield
        if self._uses_sessions:
            self._timed("end", "/end_weight_update", {})
        self._timed("flush", "/flush_cache", {})
        self._timed("resume", "/continue_generation", {})

    def load(self, entries: list[str], load_format: str | None) -> None:
        """POST one payload per TP rank, base64."""
        body = {"serialized_named_tensors": entries, "load_format": load_format, "flush_cache": False}
        self._measured.count("http_body", self._timed("load", "/update_weights_from_tensor", body))
        self._measured.count("posts", 1)

    def _timed(self, phase: str, path: str, body: dict[str, Any]) -> int:
        with self._measured.phase(phase):
            return post(self._url + path, body)


def post(url: str, body: dict[str, Any]) -> int:
    """One call on a new connection; how many bytes its body had. Raises ``requests.HTTPError`` with SGLang's words."""
    with requests.Session() as session:
        session.trust_env = False  # a proxy from the environment has no part in calls within one host
        response = session.post(url, json=body, timeout=CALL_S)
    if not response.ok:
        raise requests.HTTPError(f"{url} answered {response.status_code}: {response.text[:500]}", response=response)
    return len(response.request.body or b"")


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this is."""

    rank: int
    tp_size: int
    device: str
    """"cuda" or "cpu"."""
    bucket_bytes: int
    """For a peer that sends buckets."""


class Peer(Protocol):
    """One way of sending: on every rank, at the same time."""

    def __call__(self, tensors: NamedTensors, place: Place, engine: Engine | None, measured: Measured) -> None:
        """Returns when this rank's part is done; on rank 0, when the engine generates with the new weights."""
