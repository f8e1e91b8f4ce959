"""What a run did, in numbers that add up over processes, and its table."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

BINS_PER_DECADE = 20
SHORTEST_S = 1e-5


@dataclass
class Tally:
    """Of one process, or of all."""

    requests: Counter[str] = field(default_factory=Counter)
    """By RPC."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """By status code and reason."""
    latencies: Counter[int] = field(default_factory=Counter)
    """By step of a scale of logarithms."""
    counts: Counter[str] = field(default_factory=Counter)
    """Of everything else that was done."""
    findings: list[str] = field(default_factory=list)
    rss: list[tuple[str, list[float]]] = field(default_factory=list)
    """By process and task: megabytes over time, a few samples."""
    longest_pause_s: float = 0.0

    def answered(self, method: str, outcome: str, seconds: float) -> None:
        """Count one request."""
        self.requests[method] += 1
        self.outcomes[outcome] += 1
        self.latencies[_step(seconds)] += 1

    def percentile_s(self, share: float) -> float:
        """Of the latencies, to within an eighth."""
        left = share * self.latencies.total()
        for step in sorted(self.latencies):
            left -= self.latencies[step]
            if left <= 0:
                return float(SHORTEST_S * 10 ** ((step + 1) / BINS_PER_DECADE))
        return 0.0

    def add(self, other: Self) -> None:
        """Take another process's in."""
        for name in ("requests", "outcomes", "latencies", "counts"):
            getattr(self, name).update(getattr(other, name))
        self.findings += other.findings
        self.rss += other.rss
        self.longest_pause_s = max(self.longest_pause_s, other.longest_pause_s)

    def to_json(self) -> dict[str, Any]:
        """For another process to read."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        """What ``to_json`` gave."""
        latencies = Counter({int(step): number for step, number in said["latencies"].items()})
        counters = {name: Counter(said[name]) for name in ("requests", "outcomes", "counts")}
        rss = [(what, samples) for what, samples in said["rss"]]
        return cls(
            **counters,
            latencies=latencies,
            findings=said["findings"],
            rss=rss,
            longest_pause_s=said["longest_pause_s"],
        )

    def table(self, seconds: float) -> str:
        """For people."""
        total = self.requests.total()
        lines = [f"{total:,} requests in {seconds:,.0f} s ({total / max(seconds, 1e-9):,.0f} a second)", ""]
        lines += [
            *_rows("RPC", self.requests),
            "",
            *_rows("answer", self.outcomes),
            "",
            *_rows("checked", self.counts),
            "",
        ]
        lines.append(
            f"latency: median {1e3 * self.percentile_s(0.5):.2f} ms, p99 {1e3 * self.percentile_s(0.99):.1f} ms"
        )
        lines.append(f"longest pause of the event loop: {self.longest_pause_s:.2f} s")
        lines += [f"RSS over {what}, in MB: {' '.join(f'{mb:.0f}' for mb in samples)}" for what, samples in self.rss]
        return "\n".join([*lines, f"findings: {len(self.findings)}", *self.findings[:50]])


def _rows(title: str, counter: Counter[str]) -> list[str]:
    return [f"{title:<52}{'number':>12}", *(f"{name:<52}{number:>12,}" for name, number in counter.most_common())]


def _step(seconds: float) -> int:
    step, bound = 0, SHORTEST_S
    while bound < seconds:
        step, bound = step + 1, SHORTEST_S * 10 ** ((step + 1) / BINS_PER_DECADE)
    return step
