"""Tensors that count how often this rank took part in their gather."""

from __future__ import annotations

import torch

from adapter.planner import TensorSpec
from adapter.sources.lazy import LazyTensor


class Counted(LazyTensor):
    """One that every rank must write, or forgo, once."""

    def __init__(self, number: int) -> None:
        self.dtype = torch.float32
        self.shape = (2, 3)
        self.name = f"layer.{number}.weight"
        self.times = 0

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    def write(self, destination: torch.Tensor) -> None:
        """Part of the gather, with a result."""
        self.times += 1
        destination.fill_(1.0)

    def forgo(self, device: torch.device) -> None:
        """Part of it, without one."""
        self.times += 1


def counted(number: int = 3) -> list[Counted]:
    return [Counted(at) for at in range(number)]
