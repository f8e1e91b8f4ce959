"""What each step of a soak does, drawn from one `random.Random`.

Pure. Invariants: the same seed gives the same steps for the same outcomes; every kind of fault comes as often as its
weight says before it comes again; an update has 1 to 12 buckets, and is of all tensors where nobody knows what the
engine holds.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from adapter.planner import Plan, TensorSpec, plan
from tests.soak.content import NAMES, SHAPES

MAX_BUCKETS = 12
BUCKETED = 4
"""At least so many buckets where a fault comes between them."""
_VERIFIED = 0.2
# About as long as an update takes.
_LONGEST_DELAY_S = 0.3
# Of the updates that may come from disk.
_FROM_DISK = 0.25
# A few contents come back all the time, so that an answer made from one can be compared with an earlier one.
_SEEDS = range(1, 7)
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong while a step's update is under way."""

    kind: str
    rank: int
    at: float
    """Where in a rank's tensors, 0 .. 1."""
    delay_s: float
    """After the ranks were told to send."""
    hold_s: float
    """For how long something is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update."""

    step: int
    seed: int
    names: tuple[str, ...]
    bucket_bytes: int
    buckets: int
    num_bytes: int
    fault: Fault | None
    verify: bool = False
    """Whether the sidecar compares the engine's checksums before it publishes."""
    from_disk: bool = False
    """Whether the server loads it from a checkpoint, and the trainer's ranks have nothing to do with it."""

    @property
    def version(self) -> str:
        """Decimal, so that versions increase."""
        return str(self.step)

    @property
    def update_id(self) -> str:
        """As the client makes it."""
        return f"disk {self.version}" if self.from_disk else self.version

    @property
    def content(self) -> dict[str, int]:
        """What it carries."""
        return dict.fromkeys(self.names, self.seed)

    @property
    def whole(self) -> bool:
        """Whether it carries every tensor."""
        return len(self.names) == len(NAMES)

    def fields(self) -> dict[str, Any]:
        """For the log."""
        return {**asdict(self), "version": self.version, "whole": self.whole}


def faults(rng: random.Random, weights: Mapping[str, int]) -> Iterator[str]:
    """Kinds without end: a deck that is shuffled anew whenever it is used up."""
    deck = [kind for kind, weight in weights.items() for _ in range(weight)]
    while True:
        rng.shuffle(deck)
        yield from deck


def fault(rng: random.Random, kind: str) -> Fault:
    """One fault of this kind."""
    return Fault(
        kind=kind,
        rank=rng.randrange(2),
        at=round(rng.random(), 3),
        delay_s=round(rng.uniform(0.0, _LONGEST_DELAY_S), 3),
        hold_s=round(rng.uniform(0.3, 2.0), 3),
    )


def healing_from_disk(rng: random.Random) -> bool:
    """Whether the server is to be healed by its own disk."""
    return rng.random() < _FROM_DISK


def step(
    rng: random.Random, number: int, *, whole: bool, fault: Fault | None, bucketed: bool, from_disk: bool = False
) -> Step:
    """One update; ``whole`` and ``bucketed`` where it must be so."""
    names = NAMES if whole or bucketed or rng.random() < 0.5 else _some(rng)
    planned, bucket_bytes = _cut(names, rng.randint(BUCKETED if bucketed else 1, MAX_BUCKETS))
    return Step(
        step=number,
        seed=rng.choice(_SEEDS),
        names=names,
        bucket_bytes=bucket_bytes,
        buckets=len(planned.buckets),
        num_bytes=sum(bucket.num_bytes for bucket in planned.buckets),
        fault=fault,
        verify=not from_disk and rng.random() < _VERIFIED,
        from_disk=from_disk,
    )


def _some(rng: random.Random) -> tuple[str, ...]:
    chosen = set(rng.sample(NAMES, rng.randint(1, len(NAMES) - 1)))
    return tuple(name for name in NAMES if name in chosen)


def _cut(names: Sequence[str], buckets: int) -> tuple[Plan, int]:
    """As many buckets, or a few less: tensors are not cut."""
    specs = [TensorSpec(name, torch.bfloat16, SHAPES[name]) for name in names]
    total = sum(spec.num_bytes for spec in specs)
    bucket_bytes = max(total // buckets, _ALIGNMENT)
    while len((planned := plan(specs, bucket_bytes)).buckets) > buckets:
        bucket_bytes += bucket_bytes // 16 + _ALIGNMENT
    return planned, bucket_bytes
