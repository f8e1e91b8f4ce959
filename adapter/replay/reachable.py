"""Every tensor that a model can be seen to hold: parameters, buffers, and plain attributes, in lists and dicts too.

Invariant: tensors are told by where their bytes lie, so that views, ``.data`` and tied weights count as
what they share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

    def is_there(self) -> bool:
        """Whether it is still that tensor, with its bytes at the same place."""
        try:
            now = self.container[self.key]
        except (KeyError, IndexError):
            return False
        return now is self.tensor and self.tensor.data_ptr() == self.address


class ModelTensors:
    """The tensors of one model at one moment."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._held = list(_all_held(model))
        self._by_storage = {held.tensor.untyped_storage().data_ptr(): held.tensor for held in self._held}

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether its bytes are the model's; a bucket that the model has kept a tensor of is, too."""
        return tensor.untyped_storage().data_ptr() in self._by_storage

    def unmoved(self) -> bool:
        """Whether every one of them is still held where it was found, with its bytes at the same place."""
        return all(held.is_there() for held in self._held)

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
        return hash(tuple(_hash_of(tensor) for tensor in self._by_storage.values()))


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


def _hash_of(tensor: torch.Tensor) -> int:
    """Over all of its storage, on its own device."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), HASHED_AT_ONCE):
        chunk = words[start : start + HASHED_AT_ONCE]
        place = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=tensor.device) * 2 + 1
        total = total * 1_000_003 + ((chunk ^ (chunk >> 29)) * place).sum()
    return hash((int(total), tuple(flat[whole:].tolist())))
