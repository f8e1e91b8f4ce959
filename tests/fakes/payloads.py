"""What one TP rank is told to load, checked as hard as SGLang and torch check it.

Invariant: an ``Entry`` exists only if every tensor in it lies inside its memory, aligned and with as many bytes as
its shape says; a real scheduler dies of anything else.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tests.fakes import shared_memory
from tests.fakes.unpickling import DType, SharedStorage, Storage, TensorView, unpickle

KNOWN_FORMATS = (None, "flattened_bucket", "direct")


@dataclass(frozen=True, slots=True)
class LoadedTensor:
    """One named tensor and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: Storage
    start_byte: int
    end_byte: int

    def digest(self) -> str:
        """Of the content if that is host memory, otherwise of the description."""
        if isinstance(self.storage, SharedStorage):
            content = shared_memory.read(self.storage.name, self.start_byte, self.end_byte)
        else:
            content = repr((self.dtype, self.shape, self.storage, self.start_byte, self.end_byte)).encode()
        return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Entry:
    """One TP rank's part of one POST."""

    tensors: tuple[LoadedTensor, ...]
    flat: TensorView | None = None
    """The one tensor of a flattened bucket."""
    metadata: tuple[Mapping[str, Any], ...] = ()
    """A flattened bucket's metadata, entry by entry, as sent."""

    def storages(self) -> set[Storage]:
        """Every piece of memory that loading this opens, once."""
        return {self.flat.storage} if self.flat else {tensor.storage for tensor in self.tensors}


def decode(data: bytes, load_format: str | None, custom_loaders: Collection[str] = ()) -> Entry:
    """Unpickle and check one entry; raises whatever would kill the scheduler."""
    if load_format not in KNOWN_FORMATS and load_format not in custom_loaders:
        raise NotImplementedError(f"Unknown load_format={load_format}")
    payload = unpickle(data)
    if load_format == "flattened_bucket":
        return _must_exist(_flattened(payload["flattened_tensor"], payload["metadata"]))
    return _must_exist(Entry(tuple(_plain(name, view) for name, view in payload)))


def release(entry: Entry) -> None:
    """Drop this importer's count of every shared-memory file, as torch does; at zero the file goes."""
    for storage in entry.storages():
        if isinstance(storage, SharedStorage):
            shared_memory.release(storage.name)


def _flattened(flat: TensorView, metadata: list[SimpleNamespace]) -> Entry:
    if flat.dtype != DType("uint8") or len(flat.shape) != 1:
        raise ValueError(f"flattened_tensor is {flat.dtype.name} of shape {flat.shape}, not a row of uint8")
    if not metadata:
        raise ValueError("Cannot create empty tensor bucket")
    tensors = tuple(_slice(flat, one) for one in metadata)
    return Entry(tensors, flat, tuple(dict(vars(one)) for one in metadata))


def _slice(flat: TensorView, one: SimpleNamespace) -> LoadedTensor:
    """``flat[start:end].view(dtype).reshape(shape)``."""
    start, end = flat.start_byte + one.start_idx, flat.start_byte + one.end_idx
    if not 0 <= one.start_idx <= one.end_idx <= flat.size_bytes:
        raise ValueError(f"{one.name}: bytes {one.start_idx} to {one.end_idx} of {flat.size_bytes}")
    if start % one.dtype.item_size:
        raise ValueError(f"{one.name}: self.storage_offset() must be divisible by {one.dtype.item_size}")
    if end - start != math.prod(one.shape) * one.dtype.item_size:
        raise ValueError(f"{one.name}: shape '{one.shape}' is invalid for input of {end - start} bytes")
    return LoadedTensor(one.name, one.dtype.name, tuple(one.shape), flat.storage, start, end)


def _plain(name: str, view: TensorView) -> LoadedTensor:
    end = view.start_byte + view.size_bytes
    return LoadedTensor(name, view.dtype.name, view.shape, view.storage, view.start_byte, end)


def _must_exist(entry: Entry) -> Entry:
    for storage in entry.storages():
        if isinstance(storage, SharedStorage) and not shared_memory.path_of(storage.name).exists():
            raise FileNotFoundError(f"No such file or directory: {storage.name}")
    return entry
