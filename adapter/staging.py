"""Tensors -> buckets in memory that can be exported, as the plan says.

Owns the staging buffers: a few that stay, in turn for one bucket after the other. Invariants: what is staged is
exactly what the manifest promised; a buffer is written only when nobody else holds it; and buffers take no more than
``buffer_bytes`` of the plan, but for those that an engine has kept from a failed update, which are said in a warning.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import torch

from adapter.checks import check_tensors
from adapter.copying import copy_all
from adapter.errors import WeightSyncError
from adapter.exportable import allocate_flat, give_back
from adapter.exports import Export, export_of, let_all_go
from adapter.filled import R_co, Region
from adapter.planner import Bucket, Placement, Plan, TensorSpec
from adapter.sources.lazy import LazyTensor, PlainTensor, Sendable
from adapter.sources.module import as_lazy

logger = logging.getLogger(__name__)

DEFAULT_BUFFERS = 2


R = TypeVar("R", bound=Region)


class Buffers(Protocol[R_co]):
    """Some regions, in turn for one bucket after the other."""

    num_buffers: int

    def take(self, bucket: int, sizes: Sequence[int], device: torch.device) -> R_co:
        """The one for this bucket, which nobody else holds; ``sizes`` are the plan's ``buffer_bytes``."""

    def views(self, plan: Plan, bucket: int) -> list[torch.Tensor]:
        """Where the tensors of this bucket go in it."""


def buffer_bytes(plan: Plan, num_buffers: int) -> list[int]:
    """How large each buffer must be: buffer i carries the buckets i, i + num_buffers, ..."""
    sizes = [bucket.num_bytes for bucket in plan.buckets]
    return [max(sizes[first::num_buffers]) for first in range(min(num_buffers, len(sizes)))]


class StagingBuffers:
    """One client's buffers, kept from update to update; made when they are first needed."""

    def __init__(self, num_buffers: int) -> None:
        if num_buffers < 1:
            raise ValueError(f"staging_buffers must be 1 or more, not {num_buffers}")
        self.num_buffers = num_buffers
        self._slots: list[Export | None] = [None] * num_buffers
        self._views: list[dict[int, list[torch.Tensor]]] = [{} for _ in self._slots]
        """By slot and bucket: where the tensors of ``_viewed`` go in it. They hold its memory, and go with it."""
        self._viewed: Plan | None = None

    @property
    def num_bytes(self) -> int:
        """What they take now."""
        return sum(export.flat.numel() for export in self._slots if export is not None)

    def take(self, bucket: int, sizes: Sequence[int], device: torch.device) -> Export:
        """The buffer for this bucket, which nobody else holds; ``sizes`` are the plan's ``buffer_bytes``.

        Raises ``WeightSyncError`` if the engine still reads what was in it earlier in the same update.
        """
        slot = bucket % self.num_buffers
        export, size = self._slots[slot], sizes[slot]
        if bucket >= self.num_buffers and export is not None and not export.released():
            raise WeightSyncError(
                f"the engine has answered for bucket {bucket - self.num_buffers} and still holds its memory: no buffer "
                f"is free for bucket {bucket}"
            )
        if export is not None and not self._is_fit(export, size, device):
            export = self._slots[slot] = None
        if export is None:
            self._views[slot].clear()
            export = self._slots[slot] = export_of(allocate_flat(size, device), written_here=True)
        return export

    def views(self, plan: Plan, bucket: int) -> list[torch.Tensor]:
        """Where the tensors of this bucket go in the buffer that was taken for it.

        Made once for a plan that comes again: a view takes 7 us, those of every expert of a model more than their copy.
        """
        if self._viewed is not plan:
            self._forget_views()
            self._viewed = plan
        slot = bucket % self.num_buffers
        export = self._slots[slot]
        assert export is not None, "it is taken first"
        if bucket not in self._views[slot]:
            self._views[slot][bucket] = [view_of(export.flat, place) for place in plan.buckets[bucket].placements]
        return self._views[slot][bucket]

    def keeps(self, export: Export) -> bool:
        """Whether this is one of the buffers, so that it outlives the update."""
        return any(export is slot for slot in self._slots)

    def release(self) -> None:
        """Give the buffers back to the system; those that an engine still holds go when it lets go."""
        on_gpu = any(export is not None and export.flat.is_cuda for export in self._slots)
        self._forget_views()
        let_all_go([export for export in self._slots if export is not None])
        for slot, export in enumerate(self._slots):
            self._slots[slot] = None
            if export is not None and export.released():
                export.drop()
        if on_gpu:
            give_back()  # a segment of its own is nobody else's before

    def _forget_views(self) -> None:
        self._viewed = None
        for views in self._views:
            views.clear()

    def _is_fit(self, export: Export, size: int, device: torch.device) -> bool:
        if not export.released():
            logger.warning(
                "the engine still holds %d bytes of a failed update; this one takes as much again", export.flat.numel()
            )
            return False
        # Larger ones are kept: the same model comes again, and plans alternate rarely.
        if export.flat.numel() < size or export.flat.device != device:
            self._forget_views()  # which hold the memory, too
            export.drop()
            if device.type == "cuda":
                give_back()  # or the old segment would stay beside the new one
            return False
        return True


class CopiedBuckets(Generic[R]):
    """The buckets of one update of whole tensors, copied one after the other: nothing is gathered."""

    def __init__(self, plan: Plan, sources: Sequence[torch.Tensor], buffers: Buffers[R], device: torch.device) -> None:
        """``sources``: every tensor of the plan, in its order, with the dtype and shape that it says."""
        self.plan = plan
        self.depth = buffers.num_buffers
        self._sources = sources
        self._buffers = buffers
        self._device = device
        self._sizes = buffer_bytes(plan, buffers.num_buffers)
        lengths = [len(bucket.placements) for bucket in plan.buckets]
        self._ends = list(accumulate(lengths, initial=0))

    def fill(self, bucket: int) -> R:
        """A buffer with this bucket's bytes."""
        export = self._buffers.take(bucket, self._sizes, self._device)
        sources = self._sources[self._ends[bucket] : self._ends[bucket + 1]]
        copy_all(self._buffers.views(self.plan, bucket), sources)
        return export

    def expect_end(self) -> None:
        """All were listed before."""

    def check_sources(self) -> None:
        """What was staged is a copy: nobody reads the tensors any more."""

    def forgo(self) -> None:
        """Nothing is gathered."""


class StagedBuckets(Generic[R]):
    """The buckets of one update, copied or gathered one after the other."""

    def __init__(
        self,
        plan: Plan,
        tensors: Iterator[tuple[str, Sendable]],
        buffers: Buffers[R],
        device: torch.device,
        *,
        one_by_one: bool = False,
    ) -> None:
        """``one_by_one``: the iterator may free or reuse a tensor's memory as soon as it is asked for the next."""
        self.plan = plan
        self._gather_failed = False
        self._one_by_one = one_by_one
        self.depth = buffers.num_buffers
        self._tensors = tensors
        self._buffers = buffers
        self._device = device
        self._sizes = buffer_bytes(plan, buffers.num_buffers)
        self._pending: LazyTensor | None = None
        """Taken from the iterator, and not written yet."""

    def fill(self, bucket: int) -> R:
        """The next bucket, in order. Raises ``ValueError`` if the tensors are not those of the plan."""
        export = self._buffers.take(bucket, self._sizes, self._device)
        self._write(self.plan.buckets[bucket], export.flat)
        return export

    def expect_end(self) -> None:
        """Raise ``ValueError`` if there are tensors that the plan does not have: they would be lost silently."""
        surplus = next(self._tensors, None)
        if surplus is not None:
            self._pending = as_lazy(surplus[1])
            raise ValueError(f"named_tensors yields {surplus[0]} after the last of specs; list it there")

    def check_sources(self) -> None:
        """What was staged is a copy: nobody reads the tensors any more."""

    def forgo(self) -> None:
        """Take part in the gathers of what was not written: other ranks wait for them."""
        if self._gather_failed:
            return
        if self._pending is not None:
            self._pending.forgo(self._device)
            self._pending = None
        forgo_all(self._tensors, self._device)

    def _write(self, bucket: Bucket, flat: torch.Tensor) -> None:
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for place in bucket.placements:
            tensor, destination = self._next(place.spec), view_of(flat, place)
            if isinstance(tensor, PlainTensor) and not self._one_by_one:
                copies.append((destination, tensor.tensor))
            else:
                self._bring(tensor, destination)
            self._pending = None
        copy_all([to for to, _ in copies], [source for _, source in copies])

    def _bring(self, tensor: LazyTensor, destination: torch.Tensor) -> None:
        try:
            tensor.write(destination)
        except BaseException:
            self._gather_failed = not isinstance(tensor, PlainTensor)  # for all ranks: there is nothing to go on with
            raise

    def _next(self, spec: TensorSpec) -> LazyTensor:
        expected = f"tensor {spec.name} {spec.dtype} {list(spec.shape)}"
        pair = next(self._tensors, None)
        if pair is None:
            raise ValueError(f"expected {expected} next, but named_tensors has ended")
        name, tensor = pair[0], as_lazy(pair[1])
        self._pending = tensor
        if (name, tensor.dtype, tensor.shape) != (spec.name, spec.dtype, spec.shape):
            raise ValueError(f"expected {expected} next, but got {name} {tensor.dtype} {list(tensor.shape)}")
        if self._one_by_one:  # the others were looked at before
            check_tensors({name: tensor}, self._device)
        return tensor


def forgo_all(tensors: Iterable[tuple[str, Sendable]], device: torch.device) -> None:
    """Take part in every gather, for ranks that write to ``device``."""
    for _, value in tensors:
        as_lazy(value).forgo(device)


def view_of(flat: torch.Tensor, place: Placement) -> torch.Tensor:
    """A tensor's place in its bucket, as that tensor."""
    end = place.byte_offset + place.spec.num_bytes
    return flat[place.byte_offset : end].view(place.spec.dtype).view(place.spec.shape)
