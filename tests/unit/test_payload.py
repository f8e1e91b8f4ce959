"""What the sidecar writes, read by a strict unpickler, by torch itself, and by SGLang's own in each release."""

import dataclasses
import gc
import io
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from adapter.exportable import allocate_flat
from adapter.exports import HostExport
from sidecar.manifest import ITEM_SIZES, BucketSpec, TensorSpec
from sidecar.memory import CudaIpcMemory, Memory, SharedMemory
from sidecar.payload import BucketPayload, _Global
from tests.fakes.payloads import decode
from tests.fakes.unpickling import CudaStorage

ROOT = Path(__file__).parents[2]
UUID = "6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c5d"
CUDA = CudaIpcMemory(
    device_uuid=UUID,
    memory_handle=b"\x01c" + bytes(range(64)),
    size_bytes=5_000_000_000,
    storage_offset_bytes=2**40 + 3,
    ref_counter_handle="/torch_11_22_33",
    ref_counter_offset=7,
    event_handle=bytes(range(64, 128)),
    event_sync_required=True,
)
ALLOWED = {which.value for which in _Global} | {("torch", dtype) for dtype in ITEM_SIZES}

BUCKET = BucketSpec(
    384,
    (
        TensorSpec("model.embed_tokens.weight", "float32", (3, 4), 0, 48),
        TensorSpec("model.norm.weight", "bfloat16", (5,), 64, 10),
        TensorSpec("späte Schicht ∑", "int64", (), 128, 8),
        TensorSpec("nothing", "float16", (0, 9), 192, 0),
        TensorSpec("model.last", "float32", (2,), 256, 8),
    ),
)
VALUES = {
    "model.embed_tokens.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "model.norm.weight": torch.tensor([1, -2, 3, -4, 0.5], dtype=torch.bfloat16),
    "späte Schicht ∑": torch.tensor(-(2**40)),
    "nothing": torch.empty(0, 9, dtype=torch.float16),
    "model.last": torch.tensor([7.0, 8.0]),
}


class OnlyTheGlobalsOfThePayload(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        assert (module_name, global_name) in ALLOWED, f"{module_name}.{global_name}"
        return super().find_class(module_name, global_name)


def filled_export() -> tuple[HostExport, SharedMemory]:
    """The values in shared memory, a little larger than the bucket, and its handle."""
    export = HostExport(allocate_flat(BUCKET.size_bytes + 64, torch.device("cpu")))
    for spec in BUCKET.tensors:
        place = export.flat[spec.byte_offset : spec.end]
        place.view(getattr(torch, spec.dtype)).view(spec.shape).copy_(VALUES[spec.name])
    shared = export.handle().shared_memory
    return export, SharedMemory(shared.manager_path, shared.name, shared.size_bytes)


def sliced(payload: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As SGLang's FlattenedTensorBucket takes it apart."""
    flat = payload["flattened_tensor"]
    return {
        meta.name: flat[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)
        for meta in payload["metadata"]
    }


def globals_of(entry: bytes) -> set[tuple[str, str]]:
    named = [str(argument).split(" ") for opcode, argument, _ in pickletools.genops(entry) if opcode.name == "GLOBAL"]
    assert not any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in pickletools.genops(entry))
    return {(module, name) for module, name in named}


def test_an_entry_names_no_global_beyond_those_that_every_release_allows() -> None:
    tensors = tuple(TensorSpec(dtype, dtype, (1,), 0, size) for dtype, size in ITEM_SIZES.items())
    payload = BucketPayload(BucketSpec(64, tensors))
    shared = SharedMemory("/tmp/manager.sock", "/torch_1", 64)
    assert globals_of(payload.entry(CUDA)) | globals_of(payload.entry(shared)) == ALLOWED


@pytest.mark.parametrize("memory", [CUDA, SharedMemory("/tmp/m", "/torch_1", 4096)], ids=["cuda", "shared"])
def test_an_entry_is_one_whole_pickle_of_protocol_3(memory: Memory) -> None:
    entry = BucketPayload(BUCKET).entry(memory)
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(entry)]
    assert opcodes[0] == ("PROTO", 3)
    assert opcodes[-1][0] == "STOP"
    pickletools.dis(entry, out=io.StringIO())  # balanced, and nothing after the end


def test_torch_rebuilds_the_right_values_from_shared_memory() -> None:
    export, memory = filled_export()
    payload = OnlyTheGlobalsOfThePayload(io.BytesIO(BucketPayload(BUCKET).entry(memory))).load()
    assert payload["flattened_tensor"].dtype == torch.uint8
    assert payload["flattened_tensor"].shape == (BUCKET.size_bytes,)
    loaded = sliced(payload)
    assert list(loaded) == list(VALUES)
    for name, expected in VALUES.items():
        torch.testing.assert_close(loaded[name], expected, rtol=0, atol=0)
    # In the exporter's own process torch may hand out the very storage; either way nothing is copied.
    export.flat[256:264].view(torch.float32).fill_(9.0)
    assert loaded["model.last"].tolist() == [9.0, 9.0]
    del payload, loaded
    gc.collect()
    export.reclaim()
    name = memory.name[1:]
    del export
    gc.collect()
    assert not (Path("/dev/shm") / name).exists()


def test_a_cuda_entry_carries_torchs_15_arguments_in_torchs_places(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *arguments: seen.append(arguments))
    OnlyTheGlobalsOfThePayload(io.BytesIO(BucketPayload(BUCKET).entry(CUDA))).load()
    assert seen == [
        (
            torch.Tensor,
            (384,),
            (1,),
            0,
            torch.storage.TypedStorage,
            torch.uint8,
            UUID,
            CUDA.memory_handle,
            5_000_000_000,
            2**40 + 3,
            False,
            b"/torch_11_22_33",
            7,
            CUDA.event_handle,
            True,
        )
    ]


def test_torchs_own_function_takes_those_15_in_that_order() -> None:
    code = reductions.rebuild_cuda_tensor.__code__
    assert code.co_varnames[: code.co_argcount] == (
        "tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype", "storage_device",
        "storage_handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad", "ref_counter_handle",
        "ref_counter_offset", "event_handle", "event_sync_required",
    )  # fmt: skip


def test_an_event_that_need_not_be_waited_for_is_said_so() -> None:
    memory = dataclasses.replace(CUDA, event_handle=b"", event_sync_required=False)
    entry = decode(BucketPayload(BUCKET).entry(memory), "flattened_bucket")
    assert entry.flat is not None
    assert isinstance(entry.flat.storage, CudaStorage)
    assert (entry.flat.storage.event_handle, entry.flat.storage.event_sync_required) == (b"", False)


@pytest.mark.parametrize("number", [0, 1, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1])
def test_every_unsigned_number_of_the_protocol_survives(number: int) -> None:
    memory = dataclasses.replace(CUDA, size_bytes=2**64 - 1, storage_offset_bytes=number)
    entry = decode(BucketPayload(BUCKET).entry(memory), "flattened_bucket")
    assert entry.flat is not None
    assert isinstance(entry.flat.storage, CudaStorage)
    assert entry.flat.storage.offset_bytes == number


def test_many_tensors_with_every_dtype_refer_back_to_the_right_things() -> None:
    dtypes = list(ITEM_SIZES)
    tensors = tuple(
        TensorSpec(f"layer.{i}", dtypes[i % 15], (i % 3, 2), 64 * i, (i % 3) * 2 * ITEM_SIZES[dtypes[i % 15]])
        for i in range(600)
    )
    entry = decode(BucketPayload(BucketSpec(64 * 600, tensors)).entry(CUDA), "flattened_bucket")
    expected = [(t.name, t.dtype, t.shape, t.byte_offset, t.end) for t in tensors]
    assert [(t.name, t.dtype, t.shape, t.start_byte, t.end_byte) for t in entry.tensors] == expected


# SGLang's own unpickler, in a process of its own: it is another release than the one installed, or none.

READER = """
import io, json, sys, torch
try:
    from sglang.srt.utils.common import SafeUnpickler
except ImportError as error:
    print("no sglang:", error); sys.exit(77)
import sglang
from torch.multiprocessing import reductions
shared, cuda = (bytes.fromhex(line) for line in sys.stdin.read().split())
payload = SafeUnpickler(io.BytesIO(shared)).load()
flat = payload["flattened_tensor"]
cut = {m.name: flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape) for m in payload["metadata"]}
seen = []
reductions.rebuild_cuda_tensor = lambda *arguments: seen.append(arguments)
SafeUnpickler(io.BytesIO(cuda)).load()
values = {name: tensor.double().tolist() for name, tensor in cut.items()}
del payload, flat, cut  # an engine drops it; a process that merely ends keeps its count
print(json.dumps({"values": values, "cuda": len(seen[0]), "from": sglang.__file__}))
"""


@pytest.mark.parametrize("release", ["installed", "0.5.20", "0.5.15.post1"])
def test_sglangs_own_safe_unpickler_loads_it(release: str) -> None:
    folder = ROOT / ".engines" / release
    if release != "installed" and not folder.is_dir():
        pytest.skip(f"{folder} does not exist; `make install` makes it")
    export, memory = filled_export()
    payload = BucketPayload(BUCKET)
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=f"{payload.entry(memory).hex()}\n{payload.entry(CUDA).hex()}",
        env={**os.environ, "PYTHONPATH": "" if release == "installed" else str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode == 77:
        export.reclaim()
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    _check_reading(done.stdout, release)
    assert export.released()


def _check_reading(output: str, release: str) -> None:
    import json

    read = json.loads(output.splitlines()[-1])
    assert (f".engines/{release}/" in read["from"]) == (release != "installed")
    assert read["values"] == {name: tensor.double().tolist() for name, tensor in VALUES.items()}
    assert read["cuda"] == 15
