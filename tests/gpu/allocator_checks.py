"""One way in which a trainer may allocate, in a process of its own: asserts, and prints what it saw as JSON.

python -m tests.gpu.allocator_checks plain|expandable|memory_saver|forked|freed_in_place
"""

import gc
import json
import multiprocessing
import sys
from typing import Any

import pytest
import torch

from adapter import MemoryNotExportable
from adapter.checks import check_tensors
from adapter.exportable import allocate_flat, give_back, segment_bytes
from adapter.exports import CudaExport
from adapter.resident import Residents
from adapter.sources import PlainTensor

SIZES = [64, 3 << 20, 33 << 20]
GPU = torch.device("cuda", 0)


def kind_of(flat: torch.Tensor) -> str:
    """Second byte of the handle: "c" for cudaMalloc, "e" for an expandable segment."""
    export = CudaExport(flat)
    handle = export.handle().cuda_ipc
    export.reclaim()
    assert handle.storage_offset_bytes == 0 or handle.memory_handle[1:2] == b"e"
    return chr(handle.memory_handle[1])


def allocated() -> dict[str, Any]:
    """Regions of several sizes: what kind they are, what they take, and that it comes back."""
    torch.ones(1, device=GPU)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    flats = [allocate_flat(size, GPU) for size in SIZES]
    taken = torch.cuda.memory_reserved() - before
    kinds = [kind_of(flat) for flat in flats]
    assert kinds == ["c"] * len(SIZES)
    assert sum(SIZES) < taken <= sum(segment_bytes(size, GPU) for size in SIZES)
    assert len({flat.untyped_storage().data_ptr() >> 21 for flat in flats}) == len(SIZES)
    flats.clear()
    give_back()
    left = torch.cuda.memory_reserved() - before
    assert left == 0
    return {"kinds": kinds, "taken": taken, "left": left}


def plain() -> dict[str, Any]:
    """As torch comes."""
    return allocated()


def expandable() -> dict[str, Any]:
    """Expandable segments everywhere, but for what is exported; afterwards again."""
    assert kind_of(torch.ones(1 << 20, dtype=torch.uint8, device=GPU)) == "e"
    seen = allocated()
    resident = torch.ones(64 << 20, dtype=torch.uint8, device=GPU)
    assert kind_of(resident) == "e", "the trainer's own setting is back"
    with pytest.raises(MemoryNotExportable, match="lies in an expandable segment"):
        Residents(allow_expandable=False).buckets([("w", resident)])
    allowed = Residents(allow_expandable=True).buckets([("w", resident)])
    return {**seen, "allowed_buckets": len(allowed.plan.buckets)}


def memory_saver() -> dict[str, Any]:
    """Inside a region of torch_memory_saver, whose memory cannot be exported."""
    from torch_memory_saver import torch_memory_saver as saver

    before = allocate_flat(64 << 20, GPU)
    with saver.region():
        paused = torch.ones(64 << 20, dtype=torch.uint8, device=GPU)
        with pytest.raises(MemoryNotExportable):
            kind_of(paused)
        with pytest.raises(MemoryNotExportable) as refusal:
            allocate_flat(64 << 20, GPU)
        assert kind_of(before) == "c"
        give_back()  # does nothing here, where torch would end the process
    after = allocate_flat(64 << 20, GPU)
    after.fill_(3)
    saver.pause()
    assert int(after.sum(dtype=torch.int64)) == 3 * (64 << 20)
    saver.resume()
    return {"kinds": [kind_of(before), kind_of(after)], "refusal": str(refusal.value)}


def forked() -> dict[str, Any]:
    """A child that was forked after CUDA was initialised."""
    torch.ones(1, device=GPU)
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe()

    def in_child() -> None:
        try:
            check_tensors({"w": PlainTensor(torch.ones(1))}, GPU)
        except ValueError as error:
            child.send(str(error))
        else:
            child.send("")

    process = context.Process(target=in_child)
    process.start()
    said = parent.recv() if parent.poll(30) else ""
    process.join(30)
    assert "forked after CUDA was initialised" in said
    return {"said": said}


def freed_in_place() -> dict[str, Any]:
    """FSDP frees a parameter's storage while the engine reads it."""
    tensor = torch.ones(32 << 20, dtype=torch.uint8, device=GPU)
    residents = Residents(allow_expandable=False)
    buckets = residents.buckets([("w", tensor)])
    buckets.fill(0)
    buckets.check_sources()
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="tensor w was freed during the update") as raised:
        buckets.check_sources()
    with pytest.raises(ValueError, match="tensor w was freed: its storage is smaller"):
        residents.buckets([("w", tensor)])
    return {"said": str(raised.value)}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
