"""Every tensor that a model can be seen to hold: parameters, buffers, and plain attributes, in lists and dicts too.

Invariant: tensors are told by where their bytes lie, so that views, ``.data`` and tied weights count as
what they share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem, is_
from typing import Any

import torch

DEPTH = 4
HASHED_AT_ONCE = 1 << 22  # int64 elements: 32 MiB, so that hashing takes little memory of a full GPU


@dataclass(frozen=True, slots=True)
class _Held:
    """One tensor, where it is held and where its bytes are."""

    container: Any
    """A dict, list or tuple."""
    key: Any
    tensor: torch.Tensor
    address: int


class ModelTensors:
    """The tensors of one model at one moment."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._held = list(_all_held(model))
        self._containers = [held.container for held in self._held]
        self._keys = [held.key for held in self._held]
        self._tensors = [held.tensor for held in self._held]
        self._first_forms = self._forms()
        self._by_storage = {held.tensor.untyped_storage().data_ptr(): held.tensor for held in self._held}

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether its bytes are the model's; a bucket that the model has kept a tensor of is, too."""
        return tensor.untyped_storage().data_ptr() in self._by_storage

    def unmoved(self) -> bool:
        """Whether every one of them is still held where it was found, with its bytes at the same place."""
        try:  # looked at before each replay, so in few passes
            now = map(getitem, self._containers, self._keys)
            return all(map(is_, now, self._tensors)) and self._forms() == self._first_forms
        except (KeyError, IndexError):
            return False

    def _forms(self) -> list[object]:
        """What is different once a tensor was moved or reshaped, or one was added or taken away."""
        addresses, strides = map(torch.Tensor.data_ptr, self._tensors), map(torch.Tensor.stride, self._tensors)
        return [list(addresses), list(strides), list(map(len, self._containers))]

    def same_as(self, other: "ModelTensors") -> bool:
        """Whether both have found the same tensors at the same places."""
        return {(id(held.tensor), held.address) for held in self._held} == {
            (id(held.tensor), held.address) for held in other._held
        }

    def dtypes(self) -> set[torch.dtype]:
        """Of all of them."""
        return {held.tensor.dtype for held in self._held}

    def digest(self) -> int:
        """Of all bytes; for comparing two states of one model."""
        return hash(tuple(hash_of(flat_of(tensor)) for tensor in self._by_storage.values()))

    def others(self, storages: set[int]) -> list[torch.Tensor]:
        """The storages at other addresses than these, as bytes."""
        return [flat_of(tensor) for address, tensor in self._by_storage.items() if address not in storages]


def _all_held(model: torch.nn.Module) -> Iterator[_Held]:
    for module in model.modules():
        yield from _held_in(vars(module), DEPTH)  # with _parameters and _buffers among them


def _held_in(container: Any, depth: int) -> Iterator[_Held]:
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(pairs):
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided and value.device.type != "meta" and value.untyped_storage().nbytes():
                yield _Held(container, key, value, value.data_ptr())
        elif isinstance(value, dict | list | tuple) and depth:
            yield from _held_in(value, depth - 1)


def flat_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def hash_of(flat: torch.Tensor) -> int:
    """Of bytes, on their own device."""
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, words.numel(), HASHED_AT_ONCE):
        chunk = words[start : start + HASHED_AT_ONCE]
        place = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=flat.device) * 2 + 1
        total = total * 1_000_003 + ((chunk ^ (chunk >> 29)) * place).sum()
    return hash((int(total), tuple(flat[whole:].tolist())))
