"""What every process holds, sampled now and then, and whether it stays the same.

Owns the sampling (from /proc) and the verdict (pure). Invariant: a process is judged on its samples after a warm-up, by
the medians of their first and last third, and all lives of a role together by their least and most.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

SHM = Path("/dev/shm")
# Samples of one life that are not judged: allocators, thread pools and histories fill.
WARM_UP = 8
MIN_JUDGED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """One process at one moment."""

    role: str
    pid: int
    fds: int
    threads: int
    rss_mb: float
    helper_fds: int = 0
    """Of ``fds``: connections to torch's helpers, of which an importer keeps one per exporter that it has ever met."""

    @property
    def own_fds(self) -> int:
        """What must not grow."""
        return self.fds - self.helper_fds


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one number went, over one life or from the least to the most over all lives."""

    life: str
    metric: str
    num_samples: int
    first: float
    last: float
    allowed: float

    def __str__(self) -> str:
        judged = "flat" if self.flat else "GROWS"
        span = f"{self.first:7.1f} -> {self.last:7.1f}"
        return f"{self.life:32} {self.metric:8} {span} (at most +{self.allowed:g}) in {self.num_samples:3}: {judged}"

    @property
    def flat(self) -> bool:
        """Whether it did not grow."""
        return self.last - self.first <= self.allowed


def sample(roles: Mapping[str, int], helper_fds: Mapping[str, int]) -> list[ProcessSample]:
    """The processes of these roles, by process id."""
    return [_sample(role, psutil.Process(pid), helper_fds.get(role, 0)) for role, pid in roles.items()]


def _sample(role: str, process: psutil.Process, helper_fds: int) -> ProcessSample:
    with process.oneshot():
        return ProcessSample(
            role=role,
            pid=process.pid,
            fds=process.num_fds(),
            threads=process.num_threads(),
            rss_mb=round(process.memory_info().rss / 2**20, 1),
            helper_fds=helper_fds,
        )


def torch_files(pids: Iterable[int]) -> list[Path]:
    """Files in /dev/shm that these processes' torch has made."""
    return sorted(path for pid in pids for path in SHM.glob(f"torch_{pid}_*"))


def mapped_files(pids: Iterable[int]) -> list[Path]:
    """SGLang's own files in /dev/shm, as its processes have them mapped."""
    maps = (line.split() for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return sorted({Path(fields[5]) for fields in maps if len(fields) > 5 and fields[5].startswith(f"{SHM}/sgl")})


def engine_roles(engine_pid: int) -> dict[str, int]:
    """The server's processes by what they do."""
    roles = {"engine": engine_pid}
    for child in psutil.Process(engine_pid).children():
        if child.name().startswith("sglang::"):
            roles[child.name().removeprefix("sglang::")] = child.pid
    return roles


def verdicts(samples: Sequence[Mapping[str, Any]], tolerances: Mapping[str, Mapping[str, float]]) -> Iterator[Verdict]:
    """Over every life that was long enough, and over all lives; ``tolerances`` by the role's kind, then by metric."""
    for role, lives in _lives(samples).items():
        for metric, allowed in tolerances[role.partition("_")[0]].items():
            values = [[float(one[metric]) for one in life] for life in lives.values()]
            for pid, life in zip(lives, values, strict=True):
                if len(life) >= WARM_UP + MIN_JUDGED:
                    yield _over_one_life(f"{role} {pid}", metric, life[WARM_UP:], allowed)
            yield _over_all_lives(f"{role}, {len(lives)} lives", metric, values, 2 * allowed)


def _lives(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[Mapping[str, Any]]]]:
    lives: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for taken in samples:
        lives[taken["role"]][taken["pid"]].append(taken)
    return lives


def _over_one_life(life: str, metric: str, values: Sequence[float], allowed: float) -> Verdict:
    third = len(values) // 3
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    return Verdict(life, metric, len(values), first, last, allowed)


def _over_all_lives(lives: str, metric: str, values: Sequence[Sequence[float]], allowed: float) -> Verdict:
    """From the least to the most that any of them had: what a life leaves to the next would add up here.

    Without each life's first sample, which may be of a process that has done nothing yet.
    """
    judged = [value for life in values for value in life[1:]] or [0.0]
    return Verdict(lives, metric, len(judged), min(judged), max(judged), allowed)


def as_fields(samples: Iterable[ProcessSample]) -> list[dict[str, Any]]:
    """For the log."""
    return [{**asdict(one), "own_fds": one.own_fds} for one in samples]
