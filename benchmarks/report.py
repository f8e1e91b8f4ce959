"""Samples -> tables in markdown. Milliseconds throughout; medians, with quartiles and extremes beside the whole."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.samples import SAMPLES, Run, Sample, Spread, medians, runs
from benchmarks.sync.ways import REFERENCE

PHASES = ("export", "collect", "pause", "begin", "load", "end", "flush", "publish", "resume")
Rows = Sequence[Sequence[str]]


def text(folder: Path) -> str:
    """Every run under ``folder``."""
    return "\n\n".join(part for run in runs(folder) for part in _parts(run) if part)


def one_line(folder: Path, way: str) -> str:
    """One way of the run in ``folder``, in short."""
    seconds = [sample.seconds for sample in Run.read(folder / SAMPLES).of(way)]
    return f"{_ms(Spread.of(seconds).median)} ms of {len(seconds)}" if seconds else "nothing"


def _parts(run: Run) -> list[str]:
    by_benchmark: dict[str, list[Sample]] = {}
    for sample in run.samples:
        by_benchmark.setdefault(sample.benchmark, []).append(sample)
    parts = [f"## {run.folder.name}", _machine(run)]
    for benchmark, samples in by_benchmark.items():
        parts += _of_one(benchmark, run, samples)
    return [*parts, _failures(run)]


def _of_one(benchmark: str, run: Run, samples: Sequence[Sample]) -> list[str]:
    if benchmark == "sync":
        return _sync(run, samples)
    if benchmark == "fleet":
        from benchmarks.fleet import table as fleet

        return [f"### {benchmark}", fleet.text(run)]
    return _plain(benchmark, samples)


def by_way(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """In the order of measurement."""
    grouped: dict[str, list[Sample]] = {}
    for sample in samples:
        grouped.setdefault(sample.way, []).append(sample)
    return grouped


def _machine(run: Run) -> str:
    where = ", ".join(run.machine.get("gpus", ())) or f"{run.machine.get('cores')} cores"
    return f"{where}; SGLang {run.machine.get('sglang')}, torch {run.machine.get('torch')}"


def _sync(run: Run, samples: Sequence[Sample]) -> list[str]:
    first = samples[0]
    ways = by_way(samples)
    bytes_of = {str(line["way"]): line for line in run.bytes}
    return [f"### {first.subject}, tp {first.tp}", _whole(ways, bytes_of), _phases(ways)]


def _whole(ways: Mapping[str, Sequence[Sample]], bytes_of: Mapping[str, Mapping[str, Any]]) -> str:
    floor = Spread.of(sample.seconds for sample in ways[REFERENCE]).median if REFERENCE in ways else 0.0
    rows = []
    for way, samples in ways.items():
        spread = Spread.of(sample.seconds for sample in samples)
        counts = {**medians([sample.counts for sample in samples]), **bytes_of.get(way, {})}
        row = [way, _ms(spread.median), f"{_ms(spread.low)} - {_ms(spread.high)}"]
        row += [f"{_ms(spread.least)} - {_ms(spread.most)}", str(spread.number)]
        row += [f"{spread.median / floor:.2f}" if floor else ""]
        row += [_number(counts.get(key)) for key in ("posts", "grpc_request", "gather", "http_body")]
        rows.append([*row, ", ".join(dict.fromkeys(sample.path for sample in samples if sample.path))])
    head = ["way", "median, ms", "quartiles", "min - max", "n", "x floor", "POSTs"]
    return table([*head, "gRPC bytes per rank", "gathered bytes", "HTTP body bytes", "path"], rows)


def _phases(ways: Mapping[str, Sequence[Sample]]) -> str:
    rows = []
    for way, samples in ways.items():
        phases = medians([sample.phases for sample in samples])
        if phases:
            rows.append([way, *(_ms(phases[name]) if name in phases else "" for name in PHASES)])
    return table(["phases, ms", *PHASES], rows) if rows else ""


def _plain(benchmark: str, samples: Sequence[Sample]) -> list[str]:
    rows = []
    named: dict[str, Sequence[Sample]] = {}
    for subject in dict.fromkeys(sample.subject for sample in samples):
        for way, mine in by_way(sample for sample in samples if sample.subject == subject).items():
            named[f"{subject}, {way}"] = mine
            spread = Spread.of(sample.seconds for sample in mine)
            counts = medians([sample.counts for sample in mine])
            said = ", ".join(f"{name} {number:,.0f}" for name, number in counts.items())
            row = [subject, way, _ms(spread.median), f"{_ms(spread.low)} - {_ms(spread.high)}"]
            rows.append([*row, f"{_ms(spread.least)} - {_ms(spread.most)}", str(spread.number), said])
    head = ["", "", "median, ms", "quartiles", "min - max", "n", "counts"]
    return [f"### {benchmark}", table(head, rows), _phases(named)]


def _failures(run: Run) -> str:
    failed = [f"- {line['way']}: {line['why']}" for line in run.failed]
    return "Not measured:\n" + "\n".join(failed) if failed else ""


def table(head: Sequence[str], rows: Rows) -> str:
    """In markdown, columns aligned for reading as text."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    ruled = [list(head), ["-" * max(3, width) for width in widths], *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in ruled
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
