"""What a caller wants sent -> buckets that can be asked for: checked, planned, and with its memory stated.

Runs in every trainer rank. Invariant: it depends on names, dtypes and shapes alone how an update is cut, so that all
ranks cut it alike; and nothing is copied or gathered here.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from adapter.bucketed import Buckets
from adapter.checks import check_finite, check_tensors
from adapter.exportable import segment_bytes
from adapter.planner import Plan, TensorSpec, plan
from adapter.sources.lazy import LazyTensor, NamedTensors, Sendable
from adapter.sources.module import lazy_tensors
from adapter.staging import StagedBuckets, StagingBuffers, buffer_bytes, forgo_all


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What an update takes of one rank's memory besides the trainer's own tensors, at most."""

    buffers: tuple[int, ...]
    """Bytes of each staging buffer; they stay until ``release_staging``. None for an update in place."""
    gather: int
    """Bytes for a moment, for the tensor that takes most to be gathered, cast or merged."""

    @property
    def total(self) -> int:
        """The bound."""
        return sum(self.buffers) + self.gather


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One update, before it is known where its memory lies."""

    plan: Plan
    tensors: dict[str, LazyTensor]
    """All of them, by name; empty if they come from an iterator."""
    iterator: Iterator[tuple[str, Sendable]]
    """In the plan's order."""

    def memory(self, buffers: StagingBuffers, device: torch.device) -> MemoryNeed:
        """What staging it takes."""
        sizes = (segment_bytes(size, device) for size in buffer_bytes(self.plan, buffers.num_buffers))
        return MemoryNeed(tuple(sizes), max((tensor.extra_bytes for tensor in self.tensors.values()), default=0))

    def staged(self, buffers: StagingBuffers, device: torch.device) -> Buckets:
        """To be copied through ``buffers`` on ``device``; raises ``ValueError`` for tensors that cannot be."""
        check_tensors(self.tensors, device)
        return StagedBuckets(self.plan, self.iterator, buffers, device, one_by_one=not self.tensors)

    def forgo(self, device: torch.device) -> None:
        """Take part in all gathers, without sending anything."""
        forgo_all(self.iterator, device)


def outgoing(
    named_tensors: NamedTensors,
    specs: Sequence[TensorSpec] | None,
    bucket_bytes: int,
    rules: Sequence[re.Pattern[str]],
) -> Outgoing:
    """Plan an update; with ``specs``, of an iterator that is read only when it is sent. Raises ``ValueError``."""
    if specs is not None:
        planned = plan(specs, bucket_bytes, rules)
        _check_order(planned, specs)
        return Outgoing(planned, {}, iter(named_tensors))
    pairs = list(named_tensors)
    tensors = lazy_tensors(pairs)
    planned = plan(_specs(pairs, tensors), bucket_bytes, rules)
    return Outgoing(planned, tensors, iter([(name, tensors[name]) for name in planned.names()]))


def check_values(tensors: dict[str, LazyTensor]) -> None:
    """Refuse NaN and infinity; raises ``ValueError`` where the tensors cannot be looked at first."""
    if not tensors:
        raise ValueError("check_finite looks at the tensors before any is sent: give a list instead of specs")
    check_finite(tensors)


def _specs(pairs: Iterable[tuple[str, Sendable]], tensors: dict[str, LazyTensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensors[name].dtype, tensors[name].shape) for name, _ in pairs]


def _check_order(planned: Plan, specs: Sequence[TensorSpec]) -> None:
    for place, spec in zip(planned.names(), specs, strict=True):
        if place != spec.name:
            raise ValueError(f"SGLang fuses {place} with a tensor before {spec.name}: list and yield them side by side")
