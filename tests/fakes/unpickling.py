"""Decodes SGLang's tensor payloads without torch: every global they may name becomes an inert recording stand-in.

Invariant: a payload that loads here names only globals that every supported release's ``SafeUnpickler`` allows
(SGLang 0.5.15.post1 to 0.5.23, srt/utils/common.py); anything else raises, as it does there.
"""

import io
import math
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SharedStorage:
    """Host memory: what torch's rebuild_storage_filename was given."""

    manager: str
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CudaStorage:
    """GPU memory: what torch's rebuild_cuda_tensor was given."""

    device: str | int
    memory_handle: bytes
    size_bytes: int
    offset_bytes: int
    ref_counter_handle: str
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool


Storage = SharedStorage | CudaStorage


@dataclass(frozen=True, slots=True)
class DType:
    """A torch dtype by its name."""

    name: str

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[self.name]


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor over somebody's storage."""

    storage: Storage
    dtype: DType
    storage_offset: int
    """In elements."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.start_byte + self.size_bytes > self.storage.size_bytes:
            raise ValueError(f"setStorage: {self} is out of bounds for storage of size {self.storage.size_bytes}")

    @property
    def start_byte(self) -> int:
        return self.storage_offset * self.dtype.item_size

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.item_size


@dataclass(frozen=True, slots=True)
class _TypedStorage:
    storage: SharedStorage
    dtype: DType


@dataclass(frozen=True, slots=True)
class _TorchClass:
    """A class of torch's, named and never called."""

    name: str


class NoTensor:
    """``torch.Tensor()``: an empty one."""


def _rebuild_storage_filename(_cls: _TorchClass, manager: bytes, handle: bytes, size: int) -> SharedStorage:
    return SharedStorage(manager.decode(), handle.decode(), int(size))


def _rebuild_typed_storage(storage: SharedStorage, dtype: DType) -> _TypedStorage:
    return _TypedStorage(storage, dtype)


def _rebuild_tensor(_cls: type[NoTensor], typed: _TypedStorage, metadata: tuple[Any, ...]) -> TensorView:
    offset, shape, stride, _requires_grad = metadata
    return TensorView(typed.storage, typed.dtype, int(offset), tuple(shape), tuple(stride))


def _rebuild_cuda_tensor(  # the 15 arguments of torch's function
    _tensor_cls: type[NoTensor],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    _storage_cls: _TorchClass,
    dtype: DType,
    device: str | int,
    handle: bytes,
    size_bytes: int,
    offset_bytes: int,
    _requires_grad: bool,
    ref_counter_handle: bytes,
    ref_counter_offset: int,
    event_handle: bytes,
    event_sync_required: bool,
) -> TensorView:
    counter = ref_counter_handle.decode()
    storage = CudaStorage(
        device, handle, size_bytes, offset_bytes, counter, ref_counter_offset, event_handle, event_sync_required
    )
    return TensorView(storage, dtype, offset, tuple(shape), tuple(stride))


_REDUCTIONS = "torch.multiprocessing.reductions"
_GLOBALS: dict[tuple[str, str], object] = {
    (_REDUCTIONS, "rebuild_cuda_tensor"): _rebuild_cuda_tensor,
    (_REDUCTIONS, "rebuild_tensor"): _rebuild_tensor,
    (_REDUCTIONS, "rebuild_typed_storage"): _rebuild_typed_storage,
    (_REDUCTIONS, "rebuild_storage_filename"): _rebuild_storage_filename,
    ("torch", "Tensor"): NoTensor,
    ("torch.storage", "TypedStorage"): _TorchClass("TypedStorage"),
    ("torch.storage", "UntypedStorage"): _TorchClass("UntypedStorage"),
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    **{("torch", name): DType(name) for name in ITEM_SIZES},
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves the globals above and no others."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = _GLOBALS.get((module_name, global_name))
        if found is None:
            raise RuntimeError(f"Blocked unsafe global ({module_name}.{global_name}) during pickle deserialization")
        return found


def unpickle(data: bytes) -> Any:
    """What SGLang's scheduler would get, in stand-ins; raises where it would."""
    load: Callable[[], Any] = _RestrictedUnpickler(io.BytesIO(data)).load
    return load()
