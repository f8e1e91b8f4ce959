"""Names, shapes and dtypes -> buckets. Pure: the same on every rank, with no communication.

Invariants: tensors keep their order; every tensor begins at a multiple of ``ALIGNMENT``; a bucket is at most
``bucket_bytes`` long, unless it holds a single tensor that is larger.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

# SGLang views each tensor in place, which needs a multiple of its element size; copies are fastest at 16 and more.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What must be known of a tensor before its bytes are."""

    name: str
    """Hugging Face name."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor; () for a scalar."""

    @property
    def num_bytes(self) -> int:
        """Its length in memory, without gaps."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor and where it goes in its bucket."""

    spec: TensorSpec
    byte_offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel in one region of memory."""

    placements: tuple[Placement, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All buckets of an update, in order."""

    buckets: tuple[Bucket, ...]


def plan(specs: Iterable[TensorSpec], bucket_bytes: int) -> Plan:
    """Cut ``specs`` into buckets of at most ``bucket_bytes``; raises ``ValueError`` if there is nothing to send."""
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes}")
    buckets = tuple(_place(group) for group in _groups(specs, bucket_bytes))
    if not buckets:
        raise ValueError("the update is empty: named_tensors yielded no tensor")
    return Plan(buckets)


def _groups(specs: Iterable[TensorSpec], bucket_bytes: int) -> Iterator[list[TensorSpec]]:
    group: list[TensorSpec] = []
    used = 0
    for spec in specs:
        size = _aligned(spec.num_bytes)
        if group and used + size > bucket_bytes:
            yield group
            group, used = [], 0
        group.append(spec)
        used += size
    if group:
        yield group


def _place(group: list[TensorSpec]) -> Bucket:
    placements, offset = [], 0
    for spec in group:
        placements.append(Placement(spec, offset))
        offset += _aligned(spec.num_bytes)
    # A bucket of empty tensors alone still needs memory that can be exported.
    return Bucket(tuple(placements), max(offset, ALIGNMENT))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
