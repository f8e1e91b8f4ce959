"""The tensors of one fleet update on their way into regions.

Invariant: whatever becomes of the update, this rank goes through every gather of its tensors once, since the trainer's
other ranks do; so tensors that are gathered can be sent once, and others as often as wanted.
"""

import torch

from adapter.filled import FilledBuckets
from adapter.fleet.regions import PlainRegion, PlainRegions
from adapter.outgoing import Outgoing, WholeTensors
from adapter.planner import Plan


class Filling:
    """One update's."""

    def __init__(self, cargo: Outgoing | WholeTensors, regions: PlainRegions, device: torch.device) -> None:
        self._cargo = cargo
        self._regions = regions
        self.device = device
        self._begun: FilledBuckets[PlainRegion] | None = None

    @property
    def plan(self) -> Plan:
        """How it is cut."""
        return self._cargo.plan

    @property
    def can_be_sent(self) -> bool:
        """Whether all of it is there, for the first time or again."""
        return self._begun is None or isinstance(self._cargo, WholeTensors)

    def start(self) -> FilledBuckets[PlainRegion]:
        """The buckets, from the first one on; raises ``ValueError`` for tensors that cannot be copied."""
        self._begun = self._cargo.staged(self._regions, self.device)
        return self._begun

    def forgo(self) -> None:
        """Take part in the gathers that are left; nothing if all were."""
        if self._begun is None:
            self._cargo.forgo(self.device)
        else:
            self._begun.forgo()
