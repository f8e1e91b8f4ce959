"""Memory that another process can open: where it is allocated, and how to tell whether a tensor lies in such memory.

Invariant: what ``allocate_flat`` returns is exportable, whatever the trainer's allocator is set to, or it raises: GPU
memory has a segment of its own, outside expandable segments; host memory is a file in /dev/shm. Inside a region of
torch_memory_saver there is no such memory, and no safe way out of it.

Why a segment of its own: a CUDA IPC handle opens the whole allocation that a tensor lies in, and a process that has it
open already lowers a second export's counter before it has read it (see ``adapter.exports``). Sources: torch 2.11,
CUDACachingAllocator (a plain MemPool follows the expandable_segments setting; one that is toggled off gets plain
segments; a MemPool that is destroyed while any other is in use ends the process, so pools are kept until none is,
and torch_memory_saver's ``disable()``, which destroys one there, was seen to end it).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import ReferenceType, ref

import torch

from adapter.errors import MemoryNotExportable
from adapter.exports import TORCH_HEADER_BYTES, CudaExport

_SMALL_SEGMENT = 2 << 20
_LARGE_SEGMENT = 20 << 20
_MAPPED_FILE = re.compile(r"^(?P<start>[0-9a-f]+)-[0-9a-f]+ \S+ 0+ \S+ \d+ +/dev/shm/torch_\S+$", re.MULTILINE)


def allocate_flat(num_bytes: int, device: torch.device) -> torch.Tensor:
    """``num_bytes`` of exportable memory on a CUDA device or the host: uint8, one-dimensional, not initialised.

    Raises ``MemoryNotExportable`` where torch does not allow for it.
    """
    if device.type == "cuda":
        return _on_gpu(num_bytes, device)
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def segment_bytes(num_bytes: int, device: torch.device) -> int:
    """What ``allocate_flat`` takes at most: torch rounds segments up (CUDACachingAllocator, get_allocation_size).

    With it goes the smallest segment for each look at how torch allocates.
    """
    if device.type != "cuda":
        return num_bytes + TORCH_HEADER_BYTES
    tried = 2 * _SMALL_SEGMENT
    if num_bytes <= _SMALL_SEGMENT // 2:
        return tried + _SMALL_SEGMENT
    if num_bytes < _LARGE_SEGMENT // 2:
        return tried + _LARGE_SEGMENT
    return tried + -(-num_bytes // _SMALL_SEGMENT) * _SMALL_SEGMENT


def is_expandable(flat: torch.Tensor) -> bool:
    """Whether GPU memory lies in an expandable segment; raises ``MemoryNotExportable`` if it cannot be exported."""
    export = CudaExport(flat)
    handle = export.handle().cuda_ipc.memory_handle
    export.reclaim()
    return handle[1:2] == b"e"


def is_shared_file(storage: torch.UntypedStorage) -> bool:
    """Whether a host storage is, from its first byte, a file of torch's in /dev/shm that is still there."""
    first_byte = storage.data_ptr() - TORCH_HEADER_BYTES
    maps = Path("/proc/self/maps").read_text()
    return any(int(found["start"], 16) == first_byte for found in _MAPPED_FILE.finditer(maps))


def _on_gpu(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Where a small region was seen to be exportable: as torch is set, or without expandable segments."""
    if not _is_expandable_now(device):
        return _in_own_segment(num_bytes, device)
    with _without_expandable_segments():
        if _is_expandable_now(device):
            raise MemoryNotExportable(
                "torch allocates in expandable segments, which the engine may have no right to open, and would not be "
                "told otherwise; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False in the trainer"
            )
        return _in_own_segment(num_bytes, device)


def _is_expandable_now(device: torch.device) -> bool:
    """Whether torch allocates in expandable segments; raises ``MemoryNotExportable`` where nothing can be exported."""
    return is_expandable(_in_own_segment(1, device))


def give_back() -> None:
    """Return GPU memory of regions that are gone to the system, with all else that torch's allocator keeps unused.

    Inside a foreign pool, such as a region of torch_memory_saver, nothing is returned: then a later call does.
    """
    if not _in_foreign_pool():
        _pools[:] = [(pool, region) for pool, region in _pools if region() is not None]  # the others go, with segments
    torch.cuda.empty_cache()


def _in_foreign_pool() -> bool:
    """Whether what this thread allocates now comes from a MemPool of somebody else."""
    probe = torch.empty(1, dtype=torch.uint8, device="cuda")
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        if 0 <= probe.data_ptr() - segment["address"] < segment["total_size"]:
            return tuple(segment["segment_pool_id"]) != (0, 0)
    return True  # it is nowhere to be seen


_pools: list[tuple[torch.cuda.MemPool, ReferenceType[torch.UntypedStorage]]] = []
"""One for each region of GPU memory, and for those that were dropped since ``give_back``."""


def _in_own_segment(num_bytes: int, device: torch.device) -> torch.Tensor:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool, device):
        flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    _pools.append((pool, ref(flat.untyped_storage())))
    return flat


@contextmanager
def _without_expandable_segments() -> Iterator[None]:
    """New segments are plain ones; afterwards the settings are those of the process's environment again."""
    configured = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings(configured or "expandable_segments:True")
