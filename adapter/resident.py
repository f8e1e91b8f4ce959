"""Tensors that lie in exportable memory already are sent from where they are: no copy, no memory.

One storage (an FSDP flat parameter, a Megatron parameter buffer, an ``allocate_flat``) is one region and one bucket.
Invariant: nothing is written here, and what was exported is the memory that the tensors had to the end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from adapter.checks import check_finite, check_tensors, is_freed
from adapter.errors import MemoryNotExportable
from adapter.exportable import is_expandable, is_shared_file
from adapter.exports import Export, export_of, let_all_go
from adapter.fusion import DEFAULT_RULES, group_names
from adapter.looks import Places, SamePlaces, places_of, plain_tensors
from adapter.planner import Bucket, Placement, Plan, TensorSpec, check_names
from adapter.recent import Recent
from adapter.sources.lazy import LazyTensor, NamedTensors, PlainTensor, Sendable
from adapter.sources.module import lazy_tensors

_DEPTH = 2


@dataclass(frozen=True, slots=True)
class Region:
    """One storage that is sent from in place: a bucket."""

    first: int
    """Index, in the list of tensors, of the first one that lies in it."""
    address: int
    num_bytes: int

    @property
    def identity(self) -> tuple[int, int]:
        """What its export is known by."""
        return self.address, self.num_bytes

    def is_of(self, storage: torch.UntypedStorage) -> bool:
        """Whether this is still that storage, as long as it was and where it was."""
        return (storage.data_ptr(), storage.nbytes()) == self.identity


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a list of tensors lies, once checked: bucket i of the plan is region i. Holds none of their memory."""

    plan: Plan
    regions: tuple[Region, ...]


class Residents:
    """One client's updates in place.

    Regions that come again are exported once, and tensors that come again at the same addresses are checked once. Of
    the trainer's memory it keeps what was sent last, by its exports; until the next update in place, or ``clear``.
    """

    def __init__(self, allow_expandable: bool, rules: Sequence[re.Pattern[str]] = DEFAULT_RULES) -> None:
        self._allow_expandable = allow_expandable
        self._rules = rules
        self._exports: dict[tuple[int, int], Export] = {}
        self._known = Recent[Places, Layout]()
        self._last: tuple[SamePlaces, Layout] | None = None

    def buckets(self, named_tensors: NamedTensors) -> "ResidentBuckets":
        """The tensors' own memory as an update; raises ``ValueError`` or ``MemoryNotExportable``."""
        pairs = list(named_tensors)
        names = tuple([name for name, _ in pairs])
        values = [value for _, value in pairs]
        if self._last is not None and self._last[0].are(names, values):
            layout, tensors = self._last[1], cast("list[torch.Tensor]", values)
            if self._is_there(layout, tensors):
                return ResidentBuckets(layout, names, tensors, self._exports)
        self._last = None
        return self._looked_at(pairs, names, values)

    def _looked_at(
        self, pairs: list[tuple[str, Sendable]], names: tuple[str, ...], values: list[Sendable]
    ) -> "ResidentBuckets":
        """The same, for other tensors than the last time."""
        tensors = plain_tensors(values)
        places = places_of(names, tensors) if tensors else None
        layout = self._known.find(places) if places else None
        if not tensors or layout is None or not self._is_there(layout, tensors):
            lazy = listed(pairs)
            tensors = [_in_place(name, tensor) for name, tensor in lazy.items()]
            layout = lay_out(names, tensors, self._allow_expandable, self._rules)
            if places:
                self._known.put(places, layout)
        if places:
            self._last = SamePlaces(places, tensors), layout
        self._forget_others(layout)
        return ResidentBuckets(layout, names, tensors, self._exports)

    def keeps(self, export: Export) -> bool:
        """Whether this region is the trainer's own memory."""
        return any(export is known for known in self._exports.values())

    def let_go(self) -> None:
        """Have an engine close what it keeps mapped."""
        let_all_go(self._exports.values())

    def clear(self) -> None:
        """Hold nothing any more."""
        self.let_go()
        self._exports.clear()
        self._known.clear()
        self._last = None

    def _is_there(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the regions are what they were. Their exports have kept them, so nothing else can lie there."""
        exports = [self._exports.get(region.identity) for region in layout.regions]
        return all(
            export is not None
            and region.is_of(export.flat.untyped_storage())
            and region.is_of(tensors[region.first].untyped_storage())
            for region, export in zip(layout.regions, exports, strict=True)
        )

    def _forget_others(self, layout: Layout) -> None:
        """An export keeps its memory: those of regions that are not sent any more must not."""
        here = {region.identity for region in layout.regions}
        for identity, export in list(self._exports.items()):
            if identity not in here and export.released():
                export.let_go()
                del self._exports[identity]


class ResidentBuckets:
    """One update's regions, where they are."""

    def __init__(
        self,
        layout: Layout,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        exports: dict[tuple[int, int], Export],
    ) -> None:
        self.plan = layout.plan
        self.depth = _DEPTH
        self._regions = layout.regions
        self._names = names
        self._tensors = tensors
        self._storages = [tensors[region.first].untyped_storage() for region in layout.regions]
        """Kept until the engine has read them, whatever becomes of the tensors."""
        self._exports = exports

    def fill(self, bucket: int) -> Export:
        """The region; nothing has to be done for it."""
        region = self._regions[bucket]
        export = self._exports.get(region.identity)
        if export is None or export.flat.data_ptr() != region.address or not export.released():
            export = self._exports[region.identity] = export_of(_flat(self._storages[bucket]))
        return export

    def expect_end(self) -> None:
        """All were listed before."""

    def check_sources(self) -> None:
        """Raise ``ValueError`` if a tensor's memory has gone while it was read."""
        for region, storage in zip(self._regions, self._storages, strict=True):
            if not region.is_of(storage):
                named = zip(self._names, self._tensors, strict=True)
                freed = (name for name, tensor in named if is_freed(tensor))
                name = next(freed, self._names[region.first])
                raise ValueError(f"tensor {name} was freed during the update: what the engine has read is unknown")

    def check_values(self) -> None:
        """Refuse NaN and infinity."""
        check_finite(lazy_tensors(zip(self._names, self._tensors, strict=True)))

    def forgo(self) -> None:
        """Nothing is gathered."""


def lay_out(
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    allow_expandable: bool,
    rules: Sequence[re.Pattern[str]] = DEFAULT_RULES,
) -> Layout:
    """Find the storages and check that they can be sent; raises ``ValueError`` or ``MemoryNotExportable``."""
    members: dict[int, list[int]] = {}
    for at, tensor in enumerate(tensors):
        members.setdefault(tensor.untyped_storage().data_ptr(), []).append(at)
    buckets = tuple(_bucket([(names[at], tensors[at]) for at in region]) for region in members.values())
    _check_groups(buckets, rules)
    for first, *_ in members.values():
        _check_exportable(names[first], tensors[first], allow_expandable)
    sizes = [bucket.num_bytes for bucket in buckets]
    regions = (Region(region[0], address, size) for (address, region), size in zip(members.items(), sizes, strict=True))
    return Layout(Plan(buckets), tuple(regions))


def listed(named_tensors: NamedTensors) -> dict[str, LazyTensor]:
    """The tensors by name, checked like any others; raises ``ValueError``."""
    pairs = list(named_tensors)
    tensors = lazy_tensors(pairs)
    check_names([TensorSpec(name, tensors[name].dtype, tensors[name].shape) for name, _ in pairs])
    first = next(iter(tensors.items()))
    check_tensors(tensors, _in_place(*first).device)
    return tensors


def _in_place(name: str, tensor: LazyTensor) -> torch.Tensor:
    if not isinstance(tensor, PlainTensor):
        raise ValueError(f"tensor {name} must be gathered or computed, so it cannot be sent in place")
    plain = tensor.tensor
    if plain.dtype != tensor.dtype:
        raise ValueError(f"tensor {name} must be cast from {plain.dtype} to {tensor.dtype}: it cannot be sent in place")
    if not plain.is_contiguous():
        raise ValueError(f"tensor {name} is not contiguous, so it cannot be sent in place: leave in_place out")
    return plain


def _check_groups(buckets: Sequence[Bucket], rules: Sequence[re.Pattern[str]]) -> None:
    """Each region is a bucket of its own, so what SGLang fuses must lie in one."""
    region_of = {place.spec.name: number for number, bucket in enumerate(buckets) for place in bucket.placements}
    names = list(region_of)
    for group in group_names(names, rules):
        parted = [names[at] for at in group if region_of[names[at]] != region_of[names[group[0]]]]
        if parted:
            raise ValueError(
                f"{names[group[0]]} and {parted[0]} must travel together, since SGLang fuses them, but lie in two "
                "storages: leave in_place out, or put them into one"
            )


def _bucket(region: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
    return Bucket(tuple(_placement(name, tensor) for name, tensor in region), region[0][1].untyped_storage().nbytes())


def _placement(name: str, tensor: torch.Tensor) -> Placement:
    byte_offset = int(tensor.storage_offset()) * tensor.element_size()
    return Placement(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), byte_offset)


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    """All of it as one tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _check_exportable(name: str, tensor: torch.Tensor, allow_expandable: bool) -> None:
    storage = tensor.untyped_storage()
    if not tensor.is_cuda:
        if not is_shared_file(storage):
            raise MemoryNotExportable(f"tensor {name} does not lie in a file of /dev/shm; use adapter.allocate_flat")
        return
    if is_expandable(_flat(storage)) and not allow_expandable:
        raise MemoryNotExportable(
            f"tensor {name} lies in an expandable segment, which an engine in another container, or under another "
            "user, has no right to open; allocate it with expandable_segments:False or adapter.allocate_flat, or say "
            "allow_expandable_segments=True where opening them was seen to work"
        )
