"""An update's buckets as whoever sends them sees them, wherever the bytes come from and whichever way they go.

Invariant: only what both ways (exported memory, broadcasts) need is asked for here.
"""

from typing import Protocol, TypeVar

import torch

from adapter.planner import Plan


class Region(Protocol):
    """Memory that a bucket is written to."""

    flat: torch.Tensor
    """uint8, one-dimensional."""


R_co = TypeVar("R_co", bound=Region, covariant=True)


class FilledBuckets(Protocol[R_co]):
    """The buckets of one update, filled when they are asked for."""

    plan: Plan
    depth: int
    """How many buckets may be out at a time."""

    def fill(self, bucket: int) -> R_co:
        """A region with this bucket's bytes; buckets are asked for in order, once."""

    def expect_end(self) -> None:
        """Raise ``ValueError`` unless the tensors are those of the plan, no more."""

    def check_sources(self) -> None:
        """After they were read: raise ``ValueError`` if memory was not there to the end."""

    def forgo(self) -> None:
        """Take part in what other ranks wait for of the tensors that were not brought; nothing once a gather failed."""
