"""Tensors that lie in exportable memory already are sent from where they are: no copy, no memory.

One storage (an FSDP flat parameter, a Megatron parameter buffer, an ``allocate_flat``) is one region and one bucket.
Invariant: nothing is written here, and what was exported is the memory that the tensors had to the end.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from adapter.checks import check_tensors, is_freed
from adapter.errors import MemoryNotExportable
from adapter.exportable import is_expandable, is_shared_file
from adapter.exports import Export, export_of
from adapter.fusion import DEFAULT_RULES, group_names
from adapter.planner import Bucket, Placement, Plan, TensorSpec, check_names
from adapter.sources.lazy import LazyTensor, NamedTensors, PlainTensor
from adapter.sources.module import lazy_tensors

_DEPTH = 2


class ResidentBuckets:
    """One update's regions, where they are. Exports of regions that come again are made once."""

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        exports: dict[tuple[int, int], Export],
        allow_expandable: bool,
        rules: Sequence[re.Pattern[str]] = DEFAULT_RULES,
    ) -> None:
        self.depth = _DEPTH
        self._regions = _regions(tensors)
        self._exports = exports
        self._allow_expandable = allow_expandable
        self.plan = Plan(tuple(_bucket(region) for region in self._regions))
        _check_groups(self._regions, rules)
        self._check_memory()
        self._forget_others()

    def fill(self, bucket: int) -> Export:
        """The region; nothing has to be done for it."""
        flat = _flat(next(iter(self._regions[bucket].values())))
        export = self._exports.get(_identity(flat))
        if export is None or export.flat.data_ptr() != flat.data_ptr() or not export.released():
            export = self._exports[_identity(flat)] = export_of(flat)
        return export

    def expect_end(self) -> None:
        """All were listed before."""

    def check_sources(self) -> None:
        """Raise ``ValueError`` if a tensor's memory has gone while it was read."""
        for region in self._regions:
            for name, tensor in region.items():
                if is_freed(tensor):
                    raise ValueError(f"tensor {name} was freed during the update: what the engine has read is unknown")

    def forgo(self) -> None:
        """Nothing is gathered."""

    def _forget_others(self) -> None:
        """An export keeps its memory: those of regions that are not sent any more must not."""
        here = {_identity(_flat(next(iter(region.values())))) for region in self._regions}
        for identity, export in list(self._exports.items()):
            if identity not in here and export.released():
                del self._exports[identity]

    def _check_memory(self) -> None:
        for region in self._regions:
            name, tensor = next(iter(region.items()))
            _check_exportable(name, tensor, self._allow_expandable)


def listed(named_tensors: NamedTensors) -> dict[str, LazyTensor]:
    """The tensors by name, checked like any others; raises ``ValueError``."""
    pairs = list(named_tensors)
    tensors = lazy_tensors(pairs)
    check_names([TensorSpec(name, tensors[name].dtype, tensors[name].shape) for name, _ in pairs])
    first = next(iter(tensors.items()))
    check_tensors(tensors, _in_place(*first).device)
    return tensors


def keeps(exports: Mapping[tuple[int, int], Export], export: Export) -> bool:
    """Whether this region is the trainer's own memory."""
    return any(export is known for known in exports.values())


def _regions(tensors: Mapping[str, LazyTensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors by the storage that they lie in, in the order of their first ones."""
    regions: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        plain = _in_place(name, tensor)
        regions.setdefault(plain.untyped_storage().data_ptr(), {})[name] = plain
    return list(regions.values())


def _in_place(name: str, tensor: LazyTensor) -> torch.Tensor:
    if not isinstance(tensor, PlainTensor):
        raise ValueError(f"tensor {name} must be gathered or computed, so it cannot be sent in place")
    plain = tensor.tensor
    if plain.dtype != tensor.dtype:
        raise ValueError(f"tensor {name} must be cast from {plain.dtype} to {tensor.dtype}: it cannot be sent in place")
    if not plain.is_contiguous():
        raise ValueError(f"tensor {name} is not contiguous, so it cannot be sent in place: leave in_place out")
    return plain


def _check_groups(regions: Sequence[Mapping[str, torch.Tensor]], rules: Sequence[re.Pattern[str]]) -> None:
    """Each region is a bucket of its own, so what SGLang fuses must lie in one."""
    region_of = {name: number for number, region in enumerate(regions) for name in region}
    names = list(region_of)
    for group in group_names(names, rules):
        parted = [names[at] for at in group if region_of[names[at]] != region_of[names[group[0]]]]
        if parted:
            raise ValueError(
                f"{names[group[0]]} and {parted[0]} must travel together, since SGLang fuses them, but lie in two "
                "storages: leave in_place out, or put them into one"
            )


def _bucket(region: Mapping[str, torch.Tensor]) -> Bucket:
    return Bucket(
        tuple(_placement(name, tensor) for name, tensor in region.items()), _flat(next(iter(region.values()))).numel()
    )


def _placement(name: str, tensor: torch.Tensor) -> Placement:
    byte_offset = int(tensor.storage_offset()) * tensor.element_size()
    return Placement(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), byte_offset)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All of the storage that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _identity(flat: torch.Tensor) -> tuple[int, int]:
    return flat.data_ptr(), flat.numel()


def _check_exportable(name: str, tensor: torch.Tensor, allow_expandable: bool) -> None:
    storage = tensor.untyped_storage()
    if not tensor.is_cuda:
        if not is_shared_file(storage):
            raise MemoryNotExportable(f"tensor {name} does not lie in a file of /dev/shm; use adapter.allocate_flat")
        return
    if is_expandable(_flat(tensor)) and not allow_expandable:
        raise MemoryNotExportable(
            f"tensor {name} lies in an expandable segment, which an engine in another container, or under another "
            "user, has no right to open; allocate it with expandable_segments:False or adapter.allocate_flat, or say "
            "allow_expandable_segments=True where opening them was seen to work"
        )
