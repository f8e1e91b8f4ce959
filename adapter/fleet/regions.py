"""Memory that broadcasts are sent from: a few regions that stay, in turn for one bucket after the other.

Invariant: a region is filled again only after its broadcast has ended, which whoever sends sees to (``depth``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapter.planner import Plan
from adapter.staging import view_of


@dataclass(slots=True)
class PlainRegion:
    """Memory of this process alone."""

    flat: torch.Tensor


class PlainRegions:
    """One sender's; made when they are first needed, and larger ones kept."""

    def __init__(self, num_buffers: int) -> None:
        if num_buffers < 1:
            raise ValueError(f"staging_buffers must be 1 or more, not {num_buffers}")
        self.num_buffers = num_buffers
        self._slots: list[PlainRegion | None] = [None] * num_buffers
        self._views: list[dict[int, list[torch.Tensor]]] = [{} for _ in self._slots]
        self._viewed: Plan | None = None

    def take(self, bucket: int, sizes: Sequence[int], device: torch.device) -> PlainRegion:
        """The region for this bucket, of at least its slot's size."""
        slot = bucket % self.num_buffers
        region, size = self._slots[slot], sizes[slot]
        if region is None or region.flat.numel() < size or region.flat.device.type != device.type:
            self._views[slot].clear()
            self._slots[slot] = None  # or the old one would stay beside the new one
            region = self._slots[slot] = PlainRegion(torch.empty(size, dtype=torch.uint8, device=device))
        return region

    def views(self, plan: Plan, bucket: int) -> list[torch.Tensor]:
        """Where the tensors of this bucket go in the region that was taken for it; made once for a plan."""
        if self._viewed is not plan:
            for views in self._views:
                views.clear()
            self._viewed = plan
        slot = bucket % self.num_buffers
        region = self._slots[slot]
        assert region is not None, "it is taken first"
        if bucket not in self._views[slot]:
            self._views[slot][bucket] = [view_of(region.flat, place) for place in plan.buckets[bucket].placements]
        return self._views[slot][bucket]

    def release(self) -> None:
        """Give the memory back."""
        self._viewed = None
        for slot, views in enumerate(self._views):
            views.clear()
            self._slots[slot] = None
