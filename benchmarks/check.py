"""``python -m benchmarks check FOLDER``: each run's medians against the targets.

Targets are ratios of medians within one run, but for the three that are times by their nature. Invariant: what a run
has not measured is neither met nor missed; several runs of one thing are judged one by one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.peers import PEERS
from benchmarks.report import table
from benchmarks.samples import Run, Sample, runs
from benchmarks.sync.ways import REFERENCE

NOT_PAUSED = ("export", "collect")
GPU_MODELS = ("dense-8b", "moe-12l", "moe-48l")


@dataclass(frozen=True, slots=True)
class Target:
    """One row: what a run must show."""

    what: str
    applies: Callable[[Run], bool]
    figure: Callable[[Run], float | None]
    """None where it was not measured."""
    limit: float
    unit: str
    at_least: bool = False
    """Whether the figure must not be below the limit; else not above."""

    def judge(self, run: Run) -> tuple[str, str] | None:
        """The figure, and "met" or "missed"; None where nothing was measured."""
        figure = self.figure(run)
        if figure is None:
            return None
        met = figure >= self.limit if self.at_least else figure <= self.limit
        return f"{figure:.2f} {self.unit}", "met" if met else "missed"

    def __str__(self) -> str:
        """What and how much."""
        return f"{self.what} {'>=' if self.at_least else '<='} {self.limit:g} {self.unit}"


def judged(folder: Path) -> tuple[str, list[str]]:
    """A table over all runs under ``folder``, and what misses."""
    rows, missed = [], []
    for run in runs(folder):
        for target in TARGETS:
            verdict = target.judge(run) if target.applies(run) else None
            if verdict is not None:
                rows.append([run.folder.name, str(target), *verdict])
            if verdict is not None and verdict[1] == "missed":
                missed.append(f"{run.folder.name}: {target}: {verdict[0]}")
    said = table(["run", "target", "figure", ""], rows) if rows else "nothing that has a target was measured"
    return "\n".join([said, *(f"missed: {one}" for one in missed)]), missed


def _seconds(samples: list[Sample]) -> float | None:
    return median(sample.seconds for sample in samples) if samples else None


def _way(name: str) -> Callable[[Run], float | None]:
    return lambda run: _seconds(run.of(name))


def _best(*names: str) -> Callable[[Run], float | None]:
    """The fastest of these ways; one of several is enough."""
    return lambda run: min((found for name in names if (found := _seconds(run.of(name))) is not None), default=None)


def _fastest_peer(run: Run) -> float | None:
    return _best(*PEERS)(run)


def _ratio(above: Callable[[Run], float | None], below: Callable[[Run], float | None]) -> Callable[[Run], float | None]:
    def figure(run: Run) -> float | None:
        first, second = above(run), below(run)
        return first / second if first is not None and second else None

    return figure


def _milliseconds(of: Callable[[Run], float | None]) -> Callable[[Run], float | None]:
    return lambda run: None if (found := of(run)) is None else found * 1e3


def _paused_besides_load(way: str) -> Callable[[Run], float | None]:
    def figure(run: Run) -> float | None:
        besides = [
            sum(seconds for phase, seconds in sample.phases.items() if phase not in (*NOT_PAUSED, "load"))
            for sample in run.of(way)
        ]
        return median(besides) if besides else None

    return figure


def _model(*names: str, tp: int = 1) -> Callable[[Run], bool]:
    return lambda run: any((sample.subject, sample.tp) in [(name, tp) for name in names] for sample in run.samples)


def _seconds_of(benchmark: str, subject: str, way: str) -> Callable[[Run], float | None]:
    return lambda run: _seconds(run.of(way, subject, benchmark))


def _control(subject: str, way: str) -> Callable[[Run], float | None]:
    return _seconds_of("control", subject, way)


def _largest(benchmark: str, way: str, count: str) -> Callable[[Run], float | None]:
    def figure(run: Run) -> float | None:
        counts = [sample.counts[count] for sample in run.of(way, benchmark=benchmark) if count in sample.counts]
        return float(max(counts)) if counts else None

    return figure


def _fleet_growth(count: str = "") -> Callable[[Run], float | None]:
    """One engine's share of the whole, or of a count, among 256 of them against among 16."""

    def share(run: Run, engines: int) -> float | None:
        samples = run.of("update", f"{engines} engines", "fleet")
        found = [sample.counts[count] if count else sample.seconds for sample in samples]
        return median(found) / engines if found else None

    return _ratio(lambda run: share(run, 256), lambda run: share(run, 16))


def _request_bytes(run: Run) -> float | None:
    counts = [line["grpc_request"] for line in run.bytes if "grpc_request" in line]
    return float(max(counts)) if counts else None


def _always(run: Run) -> bool:
    return bool(run.samples)


def _targets() -> Iterator[Target]:
    """In the order of the issue: the most important first."""
    floor = _way(REFERENCE)
    resident, staged = _way("replay_in_place"), _best("replay_staged", "replay_staged_buckets")
    dense, moe, two = _model("dense-8b"), _model("moe-12l"), _model("dense-8b", tp=2)
    any_gpu = _model(*GPU_MODELS)
    yield Target("dense, resident, replay / copy", dense, _ratio(resident, floor), 1.5, "x")
    yield Target("dense, staged, replay / copy", dense, _ratio(staged, floor), 2.6, "x")
    yield Target("MoE, resident, replay / copy", moe, _ratio(resident, floor), 1.6, "x")
    yield Target("MoE, fastest peer / resident, replay", moe, _ratio(_fastest_peer, resident), 25, "x", at_least=True)
    yield Target("MoE, staged, replay / copy", moe, _ratio(staged, floor), 3, "x")
    stock = _best("stock_staged", "stock_staged_buckets")
    yield Target("stock, staged / fastest peer", any_gpu, _ratio(stock, _fastest_peer), 1, "x")
    yield Target("dense, tp 2, resident, replay", two, _milliseconds(resident), 12, "ms")
    yield Target("dense, tp 2, fastest peer / replay", two, _ratio(_fastest_peer, resident), 3, "x", at_least=True)
    for subject in ("8 ranks", "32 ranks"):
        added, gathered = _control(subject, "sidecar_adds"), _control(subject, "gather_object")
        yield Target(f"{subject}: sidecar adds / gather_object", _always, _ratio(added, gathered), 1, "x")
    growth = _ratio(_control("32 ranks", "sidecar_adds"), _control("8 ranks", "sidecar_adds"))
    yield Target("what the sidecar adds, 32 / 8 ranks", _always, growth, 4, "x")
    tensors = _ratio(_control("10000 tensors", "by_digest"), _control("10 tensors", "by_digest"))
    yield Target("an update by digest, 10,000 / 10 tensors", _always, tensors, 2, "x")
    by_digest = _largest("control", "by_digest", "grpc_request")
    yield Target("request bytes per rank, by digest", _always, by_digest, 2000, "B")
    yield Target("request bytes per rank", _always, _request_bytes, 2000, "B")
    paused = _milliseconds(_paused_besides_load("replay_in_place"))
    yield Target("dense, paused besides the load, replay", dense, paused, 5, "ms")
    for subject in ("20000 tensors, 1 ranks", "20000 tensors, 2 ranks"):
        composed = _milliseconds(_seconds_of("manifest", subject, "collect_and_compose"))
        yield Target(f"{subject}: collect and compose", _always, composed, 500, "ms")
    yield Target("fleet's control, one engine of 256 / of 16", _always, _fleet_growth(), 1.5, "x")
    trainer = _fleet_growth("trainer_cpu_us")
    yield Target("fleet's control, trainer's CPU, one engine of 256 / of 16", _always, trainer, 1.5, "x")


TARGETS = tuple(_targets())
