"""Where a rank's bytes are, for another process to open: one class per kind of memory, and every check of it.

Invariant: a handle that ``check`` let pass will not make SGLang's scheduler raise for its form: an exception there
kills the server. What only the engine can see (that a GPU is visible to it) is checked as far as this host shows it.

Facts borrowed: torch's CUDA IPC handle is 64 bytes, or since 2.5 a version byte, a type byte ('c' for cudaMalloc,
'e' for expandable segments) and the rest (c10/cuda/CUDACachingAllocator.cpp); its host shared memory is a file in
/dev/shm that begins with a header of 64 bytes (seen with torch 2.13 and 2.14).
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG

from sidecar.errors import InvalidRequest, Reason

SHM_DIRECTORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
SHM_HEADER_BYTES = 64
EVENT_HANDLE_BYTES = 64
CUDA_HANDLE_BYTES = 64
CUDA_MALLOC, CUDA_EXPANDABLE_SEGMENT = ord("c"), ord("e")
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
GPU_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class CudaIpcMemory:
    """A CUDA storage: the values of torch's ``UntypedStorage._share_cuda_()``, with a UUID for the device."""

    device_uuid: str
    """As torch prints it, without "GPU-"."""
    memory_handle: bytes
    size_bytes: int
    storage_offset_bytes: int
    ref_counter_handle: str
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A host storage: the values of torch's ``UntypedStorage._share_filename_cpu_()``."""

    manager_path: str
    name: str
    size_bytes: int


Memory = CudaIpcMemory | SharedMemory


def check(memory: Memory, needed_bytes: int, where: str) -> None:
    """Raise ``InvalidRequest`` if this handle cannot hold ``needed_bytes`` or has a wrong form.

    ``where`` begins the message, such as "rank 1, bucket 0".
    """
    if memory.size_bytes < needed_bytes:
        raise _invalid(where, f"the memory handle spans {memory.size_bytes} bytes, the bucket needs {needed_bytes}")
    match memory:
        case CudaIpcMemory():
            _check_cuda(memory, where)
        case SharedMemory():
            _check_shared(memory, where)


def _check_cuda(memory: CudaIpcMemory, where: str) -> None:
    handle = memory.memory_handle
    if not _is_cuda_handle(handle):
        expected = f"{CUDA_HANDLE_BYTES + 2} bytes ({CUDA_HANDLE_BYTES} from old torch), or an expandable segment's"
        raise _invalid(where, f"memory_handle of {len(handle)} bytes is none of torch's; expected {expected}")
    if memory.event_sync_required and len(memory.event_handle) != EVENT_HANDLE_BYTES:
        length = len(memory.event_handle)
        raise _invalid(where, f"event_handle has {length} bytes instead of {EVENT_HANDLE_BYTES}")
    if not memory.ref_counter_handle.startswith("/") or len(memory.ref_counter_handle) > 255:
        raise _invalid(where, f"ref_counter_handle {memory.ref_counter_handle[:64]!r} names no shared-memory file")
    if memory.storage_offset_bytes < 0 or memory.ref_counter_offset < 0:
        raise _invalid(where, "storage_offset_bytes and ref_counter_offset must not be negative")
    if not GPU_UUID.fullmatch(memory.device_uuid):
        raise _invalid(where, f"device_uuid {memory.device_uuid[:64]!r} is not a GPU's UUID")
    here = visible_gpu_uuids()
    if here and memory.device_uuid not in here:
        raise _invalid(where, f"GPU {memory.device_uuid!r} is not on this host; it has {', '.join(sorted(here))}")


def _is_cuda_handle(handle: bytes) -> bool:
    if len(handle) == CUDA_HANDLE_BYTES:
        return True
    if len(handle) == CUDA_HANDLE_BYTES + 2 and handle[1] == CUDA_MALLOC:
        return True
    return len(handle) > 26 and handle[1] == CUDA_EXPANDABLE_SEGMENT


def _check_shared(memory: SharedMemory, where: str) -> None:
    """Opening a missing file or manager raises in the engine, so look first."""
    if not _is_shared_memory_name(memory.name):
        raise _invalid(where, f"shared memory name {memory.name[:64]!r} is not of the form /name")
    file = SHM_DIRECTORY / memory.name[1:]
    try:
        status = file.stat()
    except OSError as error:
        problem = f"cannot see shared memory {memory.name} ({error.strerror}); trainer and engine must share /dev/shm"
        raise _invalid(where, problem) from error
    if not S_ISREG(status.st_mode):
        raise _invalid(where, f"shared memory {memory.name} is no file")
    if status.st_size < memory.size_bytes + SHM_HEADER_BYTES:
        length = status.st_size
        raise _invalid(where, f"shared memory {memory.name} has {length} bytes, too few for {memory.size_bytes}")
    if not Path(memory.manager_path).is_socket():
        problem = f"cannot see torch_shm_manager's socket {memory.manager_path[:128]!r}"
        raise _invalid(where, f"{problem}; trainer and engine must share the temporary directory")


def _is_shared_memory_name(name: str) -> bool:
    return name.startswith("/") and "/" not in name[1:] and name[1:].strip(".") != "" and name.isprintable()


@cache
def visible_gpu_uuids() -> frozenset[str]:
    """UUIDs of the GPUs that the NVIDIA driver shows on this host; empty where it shows none."""
    uuids = set()
    for information in NVIDIA_GPUS.glob("*/information"):
        for line in information.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "GPU UUID":
                uuids.add(value.strip().removeprefix("GPU-"))
    return frozenset(uuids)


def _invalid(where: str, problem: str) -> InvalidRequest:
    return InvalidRequest(Reason.INVALID_HANDLE, f"{where}: {problem}", where=where)
