"""What must be the same of a list of tensors for what was made of an earlier one to hold again.

Called in every trainer rank, at each update: a few passes in C over all tensors, half a microsecond for each, and a
quarter for the very objects of the last update.
Invariant: a look holds names and numbers, no tensor and none of the trainer's memory; and only whole, dense tensors
have one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from weakref import ref

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


class SameTensors:
    """The very tensor objects of a list, and where their bytes are; keeps none of them alive.

    For tensors sent in place that is all there is to compare: another shape of the same object, over the same bytes, is
    the same to who reads them.
    """

    def __init__(self, names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> None:
        self._names = names
        self._references = list(map(ref, tensors))
        self._addresses = list(map(torch.Tensor.data_ptr, tensors))

    def are(self, names: tuple[str, ...], values: Sequence[Sendable]) -> bool:
        """Whether these are they, where they were."""
        return (
            names == self._names
            and len(values) == len(self._references)
            and all(reference() is value for reference, value in zip(self._references, values, strict=True))
            and list(map(torch.Tensor.data_ptr, values)) == self._addresses  # type: ignore[arg-type]  # since they are
        )


class SameForms(SameTensors):
    """The same for tensors that are copied: neither has one been given another dtype or shape over the same bytes.

    Strides may have changed, since a copy follows them; and a storage that was freed, or grown, is at another address.
    """

    def __init__(self, form: Form, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(form.names, tensors)
        self._dtypes = form.dtypes
        self._shapes = form.shapes

    def are(self, names: tuple[str, ...], values: Sequence[Sendable]) -> bool:
        """Whether these are they, where and what they were."""
        return (
            super().are(names, values)
            and list(map(_dtype, values)) == self._dtypes
            and list(map(_shape, values)) == self._shapes
        )


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
