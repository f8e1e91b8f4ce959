"""A tensor that is made whole only when the memory that it is to travel in is there.

Owns the contract between what a trainer holds (shards, adapters, other dtypes) and staging. Invariant: ``write`` needs
no more memory of this rank than ``extra_bytes`` besides its destination, and every rank that shares a tensor calls
``write`` or ``forgo`` for it, once and in the same order, whatever went wrong elsewhere: so nobody waits in a
collective for a rank that has given up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeAlias

import torch


class LazyTensor(ABC):
    """One tensor of an update, seen from one trainer rank. Used in the trainer's process alone."""

    dtype: torch.dtype
    """What arrives at the engine."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    extra_bytes: int = 0
    """Memory that ``write`` takes for a moment, besides its destination."""

    @abstractmethod
    def write(self, destination: torch.Tensor) -> None:
        """Bring the whole tensor into ``destination``: contiguous, of this dtype and shape."""

    def forgo(self, device: torch.device) -> None:  # noqa: B027 - most need nothing of each other
        """Take part in what other ranks' ``write`` to ``device`` needs of this one, without a result."""

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """What this rank itself holds of it, for checks: nothing here may wait for another rank."""
        return ()

    @property
    def num_bytes(self) -> int:
        """Length of the whole tensor, without gaps."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class GatheredTensor(LazyTensor):
    """One whose ``write`` every rank of a group must call."""

    def forgo(self, device: torch.device) -> None:
        """Gather for the others' sake, and drop it."""
        self.write(torch.empty(self.shape, dtype=self.dtype, device=device))


Sendable: TypeAlias = torch.Tensor | LazyTensor
"""What a pair of ``named_tensors`` may hold; DTensors are tensors."""
NamedTensors: TypeAlias = Iterable[tuple[str, Sendable]]
"""(Hugging Face name, tensor) pairs."""


class PlainTensor(LazyTensor):
    """A whole tensor, of any strides, on the staging buffer's device or the host; cast on the way if asked."""

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensor = tensor.detach()
        self.dtype = dtype or tensor.dtype
        self.shape = tuple(tensor.shape)

    def write(self, destination: torch.Tensor) -> None:
        """Copy, with the strides and the dtype of the destination."""
        destination.copy_(self.tensor)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """The tensor itself."""
        return (self.tensor,)
