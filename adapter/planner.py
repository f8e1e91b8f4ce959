"""Names, shapes and dtypes -> buckets. Pure: the same on every rank, with no communication.

Invariants: tensors keep their order, but for those that SGLang fuses, which follow the first of their group; such a
group is never cut; every tensor begins at a multiple of ``ALIGNMENT``, or in a dense plan where the one before it ends;
a bucket is at most ``bucket_bytes`` long, unless it holds a single tensor that is larger.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from adapter.fusion import DEFAULT_RULES, group_names

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

    def names(self) -> list[str]:
        """Every tensor, in the order in which it is sent."""
        return [place.spec.name for bucket in self.buckets for place in bucket.placements]


def plan(
    specs: Iterable[TensorSpec],
    bucket_bytes: int,
    rules: Sequence[re.Pattern[str]] = DEFAULT_RULES,
    *,
    dense: bool = False,
) -> Plan:
    """Cut ``specs`` into buckets of at most ``bucket_bytes``, with what ``rules`` bind (``adapter.fusion``) together.

    ``dense``: as SGLang receives a broadcast bucket, tensors one after the other. The largest elements come first then,
    since that alone keeps each tensor at a multiple of its element size.

    Raises ``ValueError`` if there is nothing to send, a name comes twice, or a group has no room in a bucket.
    """
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes}")
    listed = tuple(specs)
    check_names(listed)
    groups = [[listed[at] for at in group] for group in group_names([spec.name for spec in listed], rules)]
    place = _place_densely if dense else _place
    return Plan(tuple(place(specs) for specs in _cut(groups, bucket_bytes)))


def check_names(specs: Sequence[TensorSpec]) -> None:
    """Raise ``ValueError`` if there is no tensor, or two of one name."""
    if not specs:
        raise ValueError("the update is empty: named_tensors yielded no tensor")
    name, times = Counter(spec.name for spec in specs).most_common(1)[0]
    if times > 1:
        raise ValueError(f"the name {name} comes {times} times in named_tensors; send each tensor once")


def _cut(groups: Iterable[list[TensorSpec]], bucket_bytes: int) -> Iterator[list[TensorSpec]]:
    bucket: list[TensorSpec] = []
    used = 0
    for group in groups:
        size = sum(_aligned(spec.num_bytes) for spec in group)
        if size > bucket_bytes and len(group) > 1:
            raise ValueError(_too_large(group, size, bucket_bytes))
        if bucket and used + size > bucket_bytes:
            yield bucket
            bucket, used = [], 0
        bucket += group
        used += size
    yield bucket


def _too_large(group: Sequence[TensorSpec], size: int, bucket_bytes: int) -> str:
    return (
        f"{group[0].name} and {group[1].name} must travel together, since SGLang fuses them, and take {size} bytes: "
        f"more than bucket_bytes, {bucket_bytes}; raise it"
    )


def _place(group: Iterable[TensorSpec]) -> Bucket:
    placements, offset = [], 0
    for spec in group:
        placements.append(Placement(spec, offset))
        offset += _aligned(spec.num_bytes)
    # A bucket of empty tensors alone still needs memory that can be exported.
    return Bucket(tuple(placements), max(offset, ALIGNMENT))


def _place_densely(group: Iterable[TensorSpec]) -> Bucket:
    placements, offset = [], 0
    for spec in sorted(group, key=lambda spec: -spec.dtype.itemsize):
        placements.append(Placement(spec, offset))
        offset += spec.num_bytes
    if not offset:
        raise ValueError(
            f"{placements[0].spec.name} and all that goes with it are empty: there is nothing to broadcast"
        )
    return Bucket(tuple(placements), offset)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
