"""Is this payload one that our composer makes of a manifest that passed, and nothing else? Asked of its bytes alone.

Three independent looks: the opcodes and globals (``pickletools``), what SGLang's own ``SafeUnpickler`` of each release
makes of it, and whether composing anew from the plain fields found gives the very same bytes.
"""

import json
import pickletools
from types import SimpleNamespace
from typing import Any

from sidecar import manifest as manifests
from sidecar import memory as memories
from sidecar.manifest import ITEM_SIZES, BucketSpec, Manifest, TensorSpec
from sidecar.memory import CudaIpcMemory, Memory, SharedMemory
from sidecar.payload import BucketPayload, replay_entry
from tests.fakes.unpickling import CudaStorage, NoTensor, Storage, TensorView
from tests.fuzz import safe_unpickler

REDUCTIONS = "torch.multiprocessing.reductions"
ALLOWED_GLOBALS = {
    (REDUCTIONS, "rebuild_cuda_tensor"),
    (REDUCTIONS, "rebuild_tensor"),
    (REDUCTIONS, "rebuild_typed_storage"),
    (REDUCTIONS, "rebuild_storage_filename"),
    ("torch", "Tensor"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
    ("types", "SimpleNamespace"),
    *(("torch", dtype) for dtype in ITEM_SIZES),
}
"""The nine of docs/fuzzing.md, torch.uint8 among the element types."""
ALLOWED_OPCODES = {
    *("PROTO", "STOP", "MARK", "POP", "BINPUT", "BINGET", "GLOBAL", "REDUCE", "BUILD"),
    *("BINUNICODE", "BINBYTES", "BININT", "LONG1", "NEWTRUE", "NEWFALSE"),
    *("EMPTY_DICT", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE2"),
}
REPLAY_KEYS = {"ask", "digest", "event", "lease", "nonce", "rank", "ranks", "size", "skippable", "tensors", "verdict"}
REPLAY_MAGIC = "sglang-weight-sync replay 1\n"
MAX_MANAGER_PATH = 107
MAX_COUNTER_OFFSET = 1 << 31


def globals_of(data: bytes) -> set[tuple[str, str]]:
    """Every global that it names; refuses opcodes that ours never need, and anything after the end."""
    named = set()
    last = -1
    for opcode, argument, position in pickletools.genops(data):
        assert opcode.name in ALLOWED_OPCODES, f"opcode {opcode.name} at {position}"
        last = position or 0
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ")
            named.add((module, name))
    assert last == len(data) - 1, "there is something after the end"
    return named


def check_bucket(data: bytes) -> tuple[BucketSpec, Memory]:
    """A flattened bucket's payload; what it says in plain fields."""
    loaded = _loaded(data)
    assert set(loaded) == {"flattened_tensor", "metadata"}, "the keys of a bucket"
    bucket, memory = _bucket(loaded), memory_of(loaded["flattened_tensor"])
    manifests.check(Manifest((bucket,)), rank=0)
    check_memory(memory, bucket.size_bytes)
    assert BucketPayload(bucket).entry(memory) == data, "composing it anew gives other bytes"
    return bucket, memory


def check_replay(data: bytes) -> tuple[dict[str, Any], Memory | None]:
    """A payload for the replay loader: its header, and its memory if it has any."""
    ((text, flat),) = _loaded(data)
    assert text.startswith(REPLAY_MAGIC)
    header: dict[str, Any] = json.loads(text.removeprefix(REPLAY_MAGIC))
    assert set(header) <= REPLAY_KEYS, f"the header has {sorted(set(header) - REPLAY_KEYS)}"
    size = int(header.get("size", 0))
    memory = None if isinstance(flat, NoTensor) else memory_of(flat)
    if memory is not None:
        check_memory(memory, size)
    assert replay_entry(text, memory, size) == data, "composing it anew gives other bytes"
    if "tensors" in header:
        _check_replayed_manifest(header)
    return header, memory


def memory_of(flat: TensorView) -> Memory:
    """The fields of the handle that a tensor lies in."""
    storage: Storage = flat.storage
    assert (flat.dtype.name, flat.storage_offset, flat.stride) == ("uint8", 0, (1,)), "a row of bytes from the start"
    if isinstance(storage, CudaStorage):
        return CudaIpcMemory(
            device_uuid=str(storage.device),
            memory_handle=storage.memory_handle,
            size_bytes=storage.size_bytes,
            storage_offset_bytes=storage.offset_bytes,
            ref_counter_handle=storage.ref_counter_handle,
            ref_counter_offset=storage.ref_counter_offset,
            event_handle=storage.event_handle,
            event_sync_required=storage.event_sync_required,
        )
    return SharedMemory(storage.manager, storage.name, storage.size_bytes)


def check_memory(memory: Memory, needed: int) -> None:
    """The form of a handle, whatever host it is of: torch raises for anything else, which ends the scheduler."""
    memories.check(memory, needed, "the engine's", here=False)
    assert needed <= memory.size_bytes < 1 << 63, "a storage that torch can have"
    if isinstance(memory, CudaIpcMemory):
        assert memory.ref_counter_offset < MAX_COUNTER_OFFSET, "a slot that no file of counters has"
    else:
        assert "\0" not in memory.manager_path, "a path with NUL"
        assert 0 < len(memory.manager_path.encode()) <= MAX_MANAGER_PATH, "no path of a socket"


def _loaded(data: bytes) -> Any:
    foreign = globals_of(data) - ALLOWED_GLOBALS
    assert not foreign, f"it names {sorted(foreign)}"
    return safe_unpickler.load_in_all(data)


def _bucket(loaded: dict[str, Any]) -> BucketSpec:
    (size,) = loaded["flattened_tensor"].shape
    return BucketSpec(size, tuple(_tensor(one) for one in loaded["metadata"]))


def _tensor(one: SimpleNamespace) -> TensorSpec:
    assert set(vars(one)) == {"name", "shape", "dtype", "start_idx", "end_idx", "numel"}
    assert one.numel == one.end_idx - one.start_idx
    return TensorSpec(one.name, one.dtype.name, tuple(one.shape), one.start_idx, one.numel)


def _check_replayed_manifest(header: dict[str, Any]) -> None:
    """The header's tensors are those that its digest names, and would pass on their own."""
    tensors = []
    for name, dtype, shape, offset in header["tensors"]:
        numel = 1
        for size in shape:
            numel *= size
        tensors.append(TensorSpec(name, dtype, tuple(shape), offset, numel * ITEM_SIZES[dtype]))
    manifest = Manifest((BucketSpec(header["size"], tuple(tensors)),))
    manifests.check(manifest, rank=0)
    assert manifest.digest() == header["digest"], "the digest of another manifest"
