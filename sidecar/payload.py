"""Typed fields -> the bytes that SGLang unpickles in ``/update_weights_from_tensor``.

The only module that writes pickle opcodes, and nothing in the sidecar reads any. It names only the globals in
``_Global``, which every supported release's ``SafeUnpickler`` accepts (SGLang 0.5.15.post1 to 0.5.23,
srt/utils/common.py). Protocol 3: SGLang's allow-lists refuse what protocol 2 needs for bytes.

One entry, for one TP rank and one bucket, is what ``load_format="flattened_bucket"`` takes
(srt/model_executor/model_runner_components/weight_updater.py)::

    {"flattened_tensor": <uint8 tensor over the rank's memory>,
     "metadata": [SimpleNamespace(name, shape, dtype, start_idx, end_idx, numel), ...]}

The metadata is the same on every rank and in every update of a manifest: ``BucketPayload`` writes it once.
"""

import pickle
import struct
from enum import Enum

from sidecar.manifest import BucketSpec, Manifest
from sidecar.memory import CudaIpcMemory, Memory, SharedMemory

LOAD_FORMAT = "flattened_bucket"
REPLAY_FORMAT = "adapter.loader.load"
"""The replay loader, by the name that the server was given for it (``--custom-weight-loader``)."""


class _Global(Enum):
    """Module and name of everything that a payload refers to, dtypes aside."""

    REBUILD_CUDA_TENSOR = ("torch.multiprocessing.reductions", "rebuild_cuda_tensor")
    REBUILD_TENSOR = ("torch.multiprocessing.reductions", "rebuild_tensor")
    REBUILD_TYPED_STORAGE = ("torch.multiprocessing.reductions", "rebuild_typed_storage")
    REBUILD_STORAGE_FILENAME = ("torch.multiprocessing.reductions", "rebuild_storage_filename")
    TENSOR = ("torch", "Tensor")
    TYPED_STORAGE = ("torch.storage", "TypedStorage")
    UNTYPED_STORAGE = ("torch.storage", "UntypedStorage")
    UINT8 = ("torch", "uint8")
    NAMESPACE = ("types", "SimpleNamespace")


class BucketPayload:
    """Composes the entries of one bucket, one per TP rank."""

    def __init__(self, bucket: BucketSpec) -> None:
        self.size_bytes = bucket.size_bytes
        self.tensors = bucket.tensors
        self._metadata = _metadata(bucket)
        self.digest = Manifest((bucket,)).digest()
        """Of this bucket alone: what the replay loader knows it by."""

    def entry(self, memory: Memory) -> bytes:
        """The pickle for the TP rank that reads ``memory``."""
        flat = _flat_tensor(memory, self.size_bytes)
        items = _text("flattened_tensor") + flat + _text("metadata") + self._metadata
        return pickle.PROTO + b"\x03" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def replay_entry(header: str, memory: Memory | None, size_bytes: int) -> bytes:
    """What the replay loader is given: ``[(header, bucket)]``, with an empty tensor in place of no memory."""
    flat = _flat_tensor(memory, size_bytes) if memory else _call(_Global.TENSOR)
    pair = _text(header) + flat + pickle.TUPLE2
    return pickle.PROTO + b"\x03" + pickle.EMPTY_LIST + pair + pickle.APPEND + pickle.STOP


def _flat_tensor(memory: Memory, size_bytes: int) -> bytes:
    """A one-dimensional uint8 tensor over the first ``size_bytes`` of ``memory``."""
    match memory:
        case CudaIpcMemory():
            return _cuda_tensor(memory, size_bytes)
        case SharedMemory():
            return _shared_tensor(memory, size_bytes)


def _cuda_tensor(memory: CudaIpcMemory, size_bytes: int) -> bytes:
    """The 15 arguments of torch's rebuild_cuda_tensor.

    The device is a UUID string: SGLang replaces that very function by one that looks it up
    (srt/utils/patch_torch.py), since ordinals differ between processes.
    """
    return _call(
        _Global.REBUILD_CUDA_TENSOR,
        _global(_Global.TENSOR),
        _tuple(_integer(size_bytes)),
        _tuple(_integer(1)),
        _integer(0),
        _global(_Global.TYPED_STORAGE),
        _global(_Global.UINT8),
        _text(memory.device_uuid),
        _bytes(memory.memory_handle),
        _integer(memory.size_bytes),
        _integer(memory.storage_offset_bytes),
        pickle.NEWFALSE,
        _bytes(memory.ref_counter_handle.encode()),
        _integer(memory.ref_counter_offset),
        _bytes(memory.event_handle),
        pickle.NEWTRUE if memory.event_sync_required else pickle.NEWFALSE,
    )


def _shared_tensor(memory: SharedMemory, size_bytes: int) -> bytes:
    storage = _call(
        _Global.REBUILD_STORAGE_FILENAME,
        _global(_Global.UNTYPED_STORAGE),
        _bytes(memory.manager_path.encode()),
        _bytes(memory.name.encode()),
        _integer(memory.size_bytes),
    )
    typed = _call(_Global.REBUILD_TYPED_STORAGE, storage, _global(_Global.UINT8))
    view = _tuple(_integer(0), _tuple(_integer(size_bytes)), _tuple(_integer(1)), pickle.NEWFALSE)
    return _call(_Global.REBUILD_TENSOR, _global(_Global.TENSOR), typed, view)


def _metadata(bucket: BucketSpec) -> bytes:
    """A list of SimpleNamespace(...): SGLang reads the attributes and builds its own class from them.

    What every entry repeats (attribute names, the class, dtypes) is remembered by the unpickler before the first one,
    so that all entries are written alike: 20,000 of them take 50 ms.
    """
    memo = _Memo()
    attributes = [memo.keep(_text(name)) for name in ("name", "shape", "dtype", "start_idx", "end_idx", "numel")]
    namespace = memo.keep(_global(_Global.NAMESPACE))
    dtypes = {dtype: memo.keep(_global_named("torch", dtype)) for dtype in {t.dtype: None for t in bucket.tensors}}
    shapes = {shape: _tuple(*map(_integer, shape)) for shape in {t.shape: None for t in bucket.tensors}}
    name, shape, dtype, start, end, numel = attributes
    new = namespace + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.EMPTY_DICT + pickle.MARK + name
    entries = [
        b"".join(
            (
                *(new, _text(tensor.name), shape, shapes[tensor.shape], dtype, dtypes[tensor.dtype]),
                *(start, _integer(tensor.byte_offset), end, _integer(tensor.end), numel, _integer(tensor.size_bytes)),
                *(pickle.SETITEMS, pickle.BUILD),
            )
        )
        for tensor in bucket.tensors
    ]
    return memo.written + pickle.EMPTY_LIST + pickle.MARK + b"".join(entries) + pickle.APPENDS


class _Memo:
    """Things that the unpickler keeps from the beginning, and how they are referred to."""

    def __init__(self) -> None:
        self.written = b""
        self._used = 0

    def keep(self, thing: bytes) -> bytes:
        """Have ``thing`` kept; the reference to it."""
        slot = bytes([self._used])
        self._used += 1
        self.written += thing + pickle.BINPUT + slot + pickle.POP
        return pickle.BINGET + slot


def _call(function: _Global, *arguments: bytes) -> bytes:
    return _global(function) + _tuple(*arguments) + pickle.REDUCE


def _global(which: _Global) -> bytes:
    return _global_named(*which.value)


def _global_named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE if items else pickle.EMPTY_TUPLE


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _bytes(value: bytes) -> bytes:
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value
