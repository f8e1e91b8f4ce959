"""Samples of a fleet's control -> tables: the whole and its steps by the number of engines, and the slow one's name."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.report import by_way, table
from benchmarks.samples import Run, Sample, Spread, medians

BENCHMARK = "fleet"
AGAIN, FIRST, SLOW = "update", "first update", "one is slow"
STEPS = ("look", "join", "begin", "prepare", "broadcast", "publish")
IN_WORDS = {"broadcast": "commit"}
"""Nothing is broadcast here: what is left of that step is the commit."""
_SLOWEST = re.compile(r"(?P<engine>[^/ ]+?)(\.sock)? \((?P<step>\w+):")


def text(run: Run) -> str:
    """All there is of one run's fleets."""
    named = list(_groups(run))
    whole = table(_WHOLE, [[*name, *_whole(samples)] for name, samples in named])
    steps = table(_STEPS, [[*name, *_steps(samples)] for name, samples in named])
    return "\n\n".join(filter(None, [whole, steps, _bytes(run)]))


_WHOLE = (
    "",
    "",
    "median, ms",
    "quartiles",
    "min - max",
    "n",
    "us per engine",
    "trainer's CPU",
    "others' CPU",
    "slowest",
)
_STEPS = ("steps, ms", "", *(IN_WORDS.get(step, step) for step in STEPS))


def slowest(samples: Sequence[Sample]) -> str:
    """Who was named most often, in which step, and how often."""
    found = [match for sample in samples if (match := _SLOWEST.search(sample.slowest))]
    if not found:
        return ""
    (engine, step), times = Counter((match["engine"], match["step"]) for match in found).most_common(1)[0]
    return f"{engine} ({step}), {times} of {len(samples)}"


def _groups(run: Run) -> Iterator[tuple[tuple[str, str], list[Sample]]]:
    """Repeats of one thing, with its two names."""
    mine = [sample for sample in run.samples if sample.benchmark == BENCHMARK]
    for way in (AGAIN, FIRST, SLOW):
        for subject in dict.fromkeys(sample.subject for sample in mine):
            if samples := by_way(sample for sample in mine if sample.subject == subject).get(way):
                yield (subject, way), samples


def _whole(samples: Sequence[Sample]) -> list[str]:
    spread = Spread.of(sample.seconds for sample in samples)
    engines, counts = samples[0].counts["engines"], medians([sample.counts for sample in samples])
    row = [f"{spread.median * 1e3:.1f}", f"{spread.low * 1e3:.1f} - {spread.high * 1e3:.1f}"]
    row += [f"{spread.least * 1e3:.1f} - {spread.most * 1e3:.1f}", str(spread.number)]
    row += [f"{value / engines:,.0f}" for value in (spread.median * 1e6, counts["trainer_cpu_us"])]
    return [*row, f"{counts['others_cpu_us'] / engines:,.0f}", slowest(samples)]


def _steps(samples: Sequence[Sample]) -> list[str]:
    """Of each step, the median and how far it went."""
    seconds = {step: [s.phases[step] for s in samples if step in s.phases] for step in STEPS}
    spreads = {step: Spread.of(found) for step, found in seconds.items() if found}
    return [_step(spreads[step]) if step in spreads else "" for step in STEPS]


def _step(spread: Spread) -> str:
    return f"{spread.median * 1e3:.1f} ({spread.least * 1e3:.1f} - {spread.most * 1e3:.1f})"


def _bytes(run: Run) -> str:
    counted = [
        f"{line['way']}: {line['grpc_request']:,} sent and {line['grpc_answer']:,} received" for line in run.bytes
    ]
    return f"gRPC bytes of one engine's update, {counted[-1]}" if counted else ""
