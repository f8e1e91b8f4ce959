"""What a caller wants sent -> buckets that can be asked for: checked, planned, and with its memory stated.

Runs in every trainer rank. Invariant: it depends on names, dtypes and shapes alone how an update is cut, so that all
ranks cut it alike; and nothing is copied or gathered here. Whole tensors that come again, in the same form, are planned
once; they are looked at each time, and more briefly if they are the same objects at the same place.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from adapter.checks import are_sound, bytes_needed, check_finite, check_tensors, refuse_forked_cuda
from adapter.exportable import segment_bytes
from adapter.filled import FilledBuckets
from adapter.looks import Form, SameForms, form_of, plain_tensors
from adapter.planner import Plan, TensorSpec, plan
from adapter.recent import Recent
from adapter.sources.lazy import LazyTensor, NamedTensors, Sendable
from adapter.sources.module import lazy_tensors
from adapter.staging import (
    Buffers,
    CopiedBuckets,
    R,
    StagedBuckets,
    StagingBuffers,
    buffer_bytes,
    forgo_all,
)


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

    def staged(self, buffers: Buffers[R], device: torch.device) -> FilledBuckets[R]:
        """To be copied through ``buffers`` on ``device``; raises ``ValueError`` for tensors that cannot be."""
        check_tensors(self.tensors, device)
        return StagedBuckets(self.plan, self.iterator, buffers, device, one_by_one=not self.tensors)

    def check_values(self) -> None:
        """Refuse NaN and infinity; raises ``ValueError`` where the tensors cannot be looked at first."""
        if not self.tensors:
            raise ValueError("check_finite looks at the tensors before any is sent: give a list instead of specs")
        check_finite(self.tensors)

    def forgo(self, device: torch.device) -> None:
        """Take part in all gathers, without sending anything."""
        forgo_all(self.iterator, device)


@dataclass(frozen=True, slots=True)
class Planned:
    """What follows from the form of a list of whole tensors, and holds for every list of that form."""

    plan: Plan
    order: tuple[int, ...]
    """The plan's tensors as indices of the list."""
    needed: tuple[int, ...]
    """By index of the list: how long the tensor's storage must be."""


@dataclass(slots=True)
class Looked:
    """What was found when a list of tensors was looked at; holds as long as they are the same."""

    planned: Planned
    sound_on: torch.device | None = None
    """For which device nothing was wrong with them."""


@dataclass(frozen=True, slots=True)
class WholeTensors:
    """One update of tensors that are there, and need only be copied."""

    looked: Looked
    names: tuple[str, ...]
    tensors: Sequence[torch.Tensor]

    @property
    def planned(self) -> Planned:
        """What follows from their form."""
        return self.looked.planned

    @property
    def plan(self) -> Plan:
        """How they are cut into buckets."""
        return self.planned.plan

    def memory(self, buffers: StagingBuffers, device: torch.device) -> MemoryNeed:
        """What staging it takes."""
        sizes = (segment_bytes(size, device) for size in buffer_bytes(self.plan, buffers.num_buffers))
        return MemoryNeed(tuple(sizes), 0)

    def staged(self, buffers: Buffers[R], device: torch.device) -> FilledBuckets[R]:
        """To be copied through ``buffers`` on ``device``; raises ``ValueError`` for tensors that cannot be."""
        if device.type == "cuda":
            refuse_forked_cuda()
        if self.looked.sound_on != device:
            if not are_sound(self.tensors, self.planned.needed, device):
                check_tensors(self._by_name(), device)  # which says what is wrong
            self.looked.sound_on = device
        return CopiedBuckets(self.plan, [self.tensors[at] for at in self.planned.order], buffers, device)

    def check_values(self) -> None:
        """Refuse NaN and infinity."""
        check_finite(self._by_name())

    def forgo(self, device: torch.device) -> None:
        """Nothing is gathered."""

    def _by_name(self) -> dict[str, LazyTensor]:
        return lazy_tensors(zip(self.names, self.tensors, strict=True))


class Planner:
    """Plans one client's updates, and remembers the last plans of whole tensors; of the tensors it holds none."""

    def __init__(self, bucket_bytes: int, rules: Sequence[re.Pattern[str]], *, dense: bool = False) -> None:
        self._bucket_bytes = bucket_bytes
        self._rules = rules
        self._dense = dense
        self._known = Recent[Form, Planned]()
        self._ends: tuple[int, int] | None = None
        """The first and last object of the last list: where they come again, all of them are looked for."""
        self._last: tuple[SameForms, Looked] | None = None

    def outgoing(self, named_tensors: NamedTensors, specs: Sequence[TensorSpec] | None) -> Outgoing | WholeTensors:
        """Plan an update; with ``specs``, of an iterator that is read only when it is sent. Raises ``ValueError``."""
        if specs is not None:
            planned = self._plan(specs)
            _check_order(planned, specs)
            return Outgoing(planned, {}, iter(named_tensors))
        pairs = list(named_tensors)
        return self._whole(pairs) or self._lazy(pairs)

    def _whole(self, pairs: Sequence[tuple[str, Sendable]]) -> WholeTensors | None:
        names, values = tuple([name for name, _ in pairs]), [value for _, value in pairs]
        if self._last is not None and self._last[0].are(names, values):
            return WholeTensors(self._last[1], names, cast("list[torch.Tensor]", values))
        tensors = plain_tensors(values)
        form = form_of(names, tensors) if tensors else None
        if not tensors or not form:
            return None
        planned = self._known.find(form)
        if planned is None:
            planned = self._planned(names, tensors)
            self._known.put(form, planned)
        return WholeTensors(self._looked(form, tensors, planned), names, tensors)

    def _looked(self, form: Form, tensors: Sequence[torch.Tensor], planned: Planned) -> Looked:
        """Remember these, unless the trainer makes new objects each time (``state_dict``): that has its price."""
        looked, ends = Looked(planned), (id(tensors[0]), id(tensors[-1]))
        self._last = (SameForms(form, tensors), looked) if ends == self._ends else None
        self._ends = ends
        return looked

    def _planned(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Planned:
        specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in zip(names, tensors, strict=True)]
        cut = self._plan(specs)
        index = {name: at for at, name in enumerate(names)}
        return Planned(cut, tuple(index[name] for name in cut.names()), tuple(map(bytes_needed, tensors)))

    def _plan(self, specs: Sequence[TensorSpec]) -> Plan:
        return plan(specs, self._bucket_bytes, self._rules, dense=self._dense)

    def _lazy(self, pairs: Sequence[tuple[str, Sendable]]) -> Outgoing:
        tensors = lazy_tensors(pairs)
        planned = self._plan(_specs(pairs, tensors))
        return Outgoing(planned, tensors, iter([(name, tensors[name]) for name in planned.names()]))


def _specs(pairs: Iterable[tuple[str, Sendable]], tensors: dict[str, LazyTensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensors[name].dtype, tensors[name].shape) for name, _ in pairs]


def _check_order(planned: Plan, specs: Sequence[TensorSpec]) -> None:
    for place, spec in zip(planned.names(), specs, strict=True):
        if place != spec.name:
            raise ValueError(f"SGLang fuses {place} with a tensor before {spec.name}: list and yield them side by side")
