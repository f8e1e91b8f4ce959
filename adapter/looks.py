"""What must be the same of a list of tensors for what was made of an earlier one to hold again.

Called in every trainer rank, at each update: a few passes in C over all tensors, half a microsecond for each, and a
quarter for the very objects of the last update.
Invariant: a look holds names and numbers, no tensor and none of the trainer's memory; and only whole, dense tensors
have one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from adapter.sources.lazy import Sendable

_KINDS = frozenset({torch.Tensor, torch.nn.Parameter})
"""Without subclasses: what a DTensor says of itself is not what this rank holds."""

_dtype = attrgetter("dtype")
_shape = attrgetter("shape")


@dataclass(frozen=True, slots=True)
class Form:
    """For a plan, and how long each storage must be. Addresses do not matter: what is there now is copied."""

    names: tuple[str, ...]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    offsets: list[int | torch.SymInt]
    """Of the first element in its storage, in elements."""


@dataclass(frozen=True, slots=True)
class Places:
    """For where tensors lie in memory that is sent from in place; all of them are contiguous."""

    names: tuple[str, ...]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    addresses: list[int]


class SameTensors(ABC):
    """The very tensor objects of a list, where their bytes are, and of which dtypes; keeps none of them alive.

    As numbers, since ``torch.utils.swap_tensors`` refuses what has a weak reference, and they are the trainer's own. So
    an object may be another one by now, which is the same as long as all else is.
    """

    def __init__(self, seen: Form | Places, tensors: Sequence[torch.Tensor]) -> None:
        """``seen``: what was seen of these tensors just now."""
        self._names = seen.names
        self._objects = list(map(id, tensors))
        self._addresses = _addresses(tensors)
        self._dtypes = seen.dtypes

    def are(self, names: tuple[str, ...], values: Sequence[Sendable]) -> bool:
        """Whether these are they, where they were."""
        return (
            names == self._names
            and list(map(id, values)) == self._objects
            and (tensors := plain_tensors(values)) is not None
            and self._addresses is not None
            and _addresses(tensors) == self._addresses
            and list(map(_dtype, tensors)) == self._dtypes
            and self._look_alike(tensors)
        )

    @abstractmethod
    def _look_alike(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether no tensor has been given another form over the same bytes that makes a difference."""


class SamePlaces(SameTensors):
    """Of tensors sent in place: as many contiguous numbers are the same, in whatever shape, to who reads them there."""

    def __init__(self, seen: Places, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(seen, tensors)
        self._lengths = list(map(torch.Tensor.numel, tensors))

    def _look_alike(self, tensors: Sequence[torch.Tensor]) -> bool:
        lengths = list(map(torch.Tensor.numel, tensors))
        return lengths == self._lengths and all(map(torch.Tensor.is_contiguous, tensors))


class SameForms(SameTensors):
    """Of tensors that are copied: strides may have changed, since a copy follows them, but no shape.

    Memory that was freed is at another address, or none; only a storage that was made smaller and lies where it lay is
    not seen.
    """

    def __init__(self, seen: Form, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(seen, tensors)
        self._shapes = seen.shapes

    def _look_alike(self, tensors: Sequence[torch.Tensor]) -> bool:
        return list(map(_shape, tensors)) == self._shapes


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """None if one of them is sparse: it has none."""
    try:
        return list(map(torch.Tensor.data_ptr, tensors))
    except RuntimeError:
        return None


def plain_tensors(values: Sequence[Sendable]) -> Sequence[torch.Tensor] | None:
    """The same, if each is a whole tensor and nothing else."""
    return values if set(map(type, values)) <= _KINDS else None  # type: ignore[return-value]


def form_of(names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> Form | None:
    """None if one of them is not dense."""
    try:
        strides = list(map(torch.Tensor.stride, tensors))
        offsets = list(map(torch.Tensor.storage_offset, tensors))
        return Form(names, list(map(_dtype, tensors)), list(map(_shape, tensors)), strides, offsets)
    except RuntimeError:  # sparse or nested: torch has no strides for it
        return None


def places_of(names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> Places | None:
    """None if one of them is not dense and contiguous, or has no memory: empty, freed, or on the meta device."""
    try:
        addresses = list(map(torch.Tensor.data_ptr, tensors))
        if 0 in addresses or not all(map(torch.Tensor.is_contiguous, tensors)):
            return None
        return Places(names, list(map(_dtype, tensors)), list(map(_shape, tensors)), addresses)
    except RuntimeError:
        return None
