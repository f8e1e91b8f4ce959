"""What was measured: one JSON line each, written as soon as it is there, and read back for tables, plots and checks.

Invariant: a line is flushed before the next thing is measured, so that a run that is cut off keeps what it has.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

SAMPLES = "samples.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One repeat of one way."""

    benchmark: str
    """"sync", "control", "manifest", "broadcast" or "fleet"."""
    subject: str
    """What it was measured on: a model, or a number of ranks or tensors."""
    tp: int
    way: str
    seconds: float
    """The whole, from "the weights are new" to "the engine generates with them"."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Bytes on each hop, POSTs."""
    path: str = ""
    """How the engine loaded it: stock, recorded, proven, replayed, fell_back; empty where that is not told."""
    slowest: str = ""
    """Of many engines: who was waited for longest, in the fleet's words."""
    warm_up: bool = False


class SampleFile:
    """Adds lines to ``samples.jsonl`` in a folder; raises ``ValueError`` where a run has left one already."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / SAMPLES
        if self._path.exists():
            raise ValueError(f"{self._path} is there already: ratios hold within one run, so choose another --out")

    def add(self, sample: Sample) -> None:
        """One sample."""
        self.note("sample", asdict(sample))

    def note(self, kind: str, content: Mapping[str, Any]) -> None:
        """Anything else that belongs to the run: the machine, a way that failed."""
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, **content}) + "\n")


@dataclass(frozen=True, slots=True)
class Run:
    """One file, read back."""

    folder: Path
    machine: Mapping[str, Any]
    samples: Sequence[Sample]
    """Warm-ups left out."""
    bytes: Sequence[Mapping[str, Any]]
    failed: Sequence[Mapping[str, Any]]

    def of(self, way: str, subject: str = "", benchmark: str = "sync") -> list[Sample]:
        """One way's samples; an empty subject stands for any."""
        return [
            sample
            for sample in self.samples
            if (sample.way, sample.benchmark) == (way, benchmark) and subject in ("", sample.subject)
        ]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """A run that is cut off in the middle of a line has its other lines."""
        kinds: dict[str, list[dict[str, Any]]] = {}
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                parsed = json.loads(line)
                kinds.setdefault(parsed.pop("kind"), []).append(parsed)
        samples = [sample for one in kinds.get("sample", []) if not (sample := Sample(**one)).warm_up]
        machine = kinds.get("machine", [{}])[0]
        return cls(path.parent, machine, samples, kinds.get("bytes", []), kinds.get("failed", []))


def runs(folder: Path) -> list[Run]:
    """Every run under ``folder``; raises ``ValueError`` if there is none."""
    files = sorted(folder.rglob(SAMPLES))
    if not files:
        raise ValueError(f"there is no {SAMPLES} under {folder}; run a benchmark with --out {folder} first")
    return [Run.read(file) for file in files]


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one thing."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third."""
    least: float
    most: float
    number: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of one value or more."""
        listed = sorted(values)
        low, _, high = quantiles(listed, n=4, method="inclusive") if len(listed) > 1 else (listed[0],) * 3
        return cls(median(listed), low, high, listed[0], listed[-1], len(listed))


def medians(maps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each key over the repeats that have it, keys in the order in which they first came."""
    keys = dict.fromkeys(key for one in maps for key in one)
    return {key: median([one[key] for one in maps if key in one]) for key in keys}
