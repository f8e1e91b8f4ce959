"""Memory that another process can open: where it is allocated, and how to tell whether a tensor lies in such memory.

Invariant: what ``allocate_flat`` returns is exportable, whatever the trainer's allocator is set to: GPU memory has a
segment of its own, outside torch_memory_saver's regions and outside expandable segments; host memory is a file in
/dev/shm.

Why a segment of its own: a CUDA IPC handle opens the whole allocation that a tensor lies in, and a process that has it
open already lowers a second export's counter before it has read it (see ``adapter.exports``). Sources: torch 2.11,
CUDACachingAllocator (a plain MemPool follows the expandable_segments setting; one that is toggled off gets plain
segments); torch_memory_saver 0.0.10, entrypoint.py (``disable()`` inside a region).
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from adapter.errors import MemoryNotExportable
from adapter.exports import TORCH_HEADER_BYTES, CudaExport

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
    """What ``allocate_flat`` takes: torch rounds segments up (CUDACachingAllocator, get_allocation_size)."""
    if device.type != "cuda":
        return num_bytes + TORCH_HEADER_BYTES
    if num_bytes <= 1 << 20:
        return 2 << 20
    return max(20 << 20, -(-num_bytes // (2 << 20)) * (2 << 20)) if num_bytes >= 10 << 20 else 20 << 20


def is_expandable(handle: bytes) -> bool:
    """Whether the handle of a CUDA allocation is that of an expandable segment."""
    return handle[1:2] == b"e"


def is_shared_file(storage: torch.UntypedStorage) -> bool:
    """Whether a host storage is, from its first byte, a file of torch's in /dev/shm that is still there."""
    first_byte = storage.data_ptr() - TORCH_HEADER_BYTES
    maps = Path("/proc/self/maps").read_text()
    return any(int(found["start"], 16) == first_byte for found in _MAPPED_FILE.finditer(maps))


def _on_gpu(num_bytes: int, device: torch.device) -> torch.Tensor:
    attempts = (nullcontext, _outside_memory_saver, _without_expandable_segments)
    problem: MemoryNotExportable | None = None
    for surroundings in attempts:
        try:
            with surroundings():
                flat = _in_own_segment(num_bytes, device)
            _try_export(flat)
        except MemoryNotExportable as error:
            problem = error
        else:
            return flat
    assert problem is not None
    raise problem


def _in_own_segment(num_bytes: int, device: torch.device) -> torch.Tensor:
    with torch.cuda.use_mem_pool(torch.cuda.MemPool(), device):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _try_export(flat: torch.Tensor) -> None:
    """Raise ``MemoryNotExportable`` unless ``flat`` has a handle that any process of this user can open."""
    export = CudaExport(flat)
    handle = export.handle().cuda_ipc.memory_handle
    export.reclaim()
    if is_expandable(handle):
        raise MemoryNotExportable(
            "torch allocates in expandable segments, which the engine may have no right to open, and would not be "
            "told otherwise; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False in the trainer"
        )


def _outside_memory_saver() -> AbstractContextManager[Any]:
    """Inside a region of torch_memory_saver: outside of it for a moment."""
    saver: Any = sys.modules.get("torch_memory_saver")
    return _disabled(saver.torch_memory_saver) if saver is not None else nullcontext()


@contextmanager
def _disabled(saver: Any) -> Iterator[None]:
    leave = saver.disable()
    try:
        leave.__enter__()
    except AssertionError:  # no region is open here
        yield
        return
    try:
        yield
    finally:
        leave.__exit__(None, None, None)


@contextmanager
def _without_expandable_segments() -> Iterator[None]:
    """New segments are plain ones; afterwards the settings are those of the process's environment again."""
    configured = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings(configured or "expandable_segments:True")
