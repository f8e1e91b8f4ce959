"""Where a rank's bytes are, for another process to open: one class per kind of memory, and every check of it.

Invariant: a handle that ``check`` let pass will not make SGLang's scheduler raise for its form: an exception there
kills the server. Memory opens on the host where it lies only, so what must exist is looked for on this host, and for
ranks of other hosts (``Placement``) not at all, unless this host shows it too.

Facts borrowed: torch's CUDA IPC handle is 64 bytes, or since 2.5 a version byte, a type byte ('c' for cudaMalloc,
'e' for expandable segments) and the rest (c10/cuda/CUDACachingAllocator.cpp); its host shared memory is a file in
/dev/shm that begins with a header of 64 bytes (seen with torch 2.13 and 2.14).
"""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG

from sidecar.errors import InvalidRequest, Reason

SHM_DIRECTORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SHM_HEADER_BYTES = 64
EVENT_HANDLE_BYTES = 64
COUNTER_BYTES = 8
SHARED_COUNT_BYTES = 4
WITH_THE_ENGINES_SHARE = 2
STORAGE_ALIGNMENT = 16  # torch's allocator cuts blocks at multiples of 512
MAX_STORAGE_BYTES = (1 << 63) - 1
MAX_COUNTERS = 1 << 31  # torch's files have 10,000
MAX_SOCKET_PATH = 107  # Linux: sun_path has 108 bytes, the last of them 0
EXPANDABLE_HEADER_BYTES = 26
CUDA_HANDLE_BYTES = 64
CUDA_MALLOC, CUDA_EXPANDABLE_SEGMENT = ord("c"), ord("e")
LEASE = re.compile("sglang-weight-sync-lease-[0-9a-f]{32}")
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
    loan: int = 0
    """Which hand-over of this memory it is: another number, other bytes."""
    lease: str = ""
    """Name of the file whose locks say how long an engine may keep it mapped; empty: not beyond its load."""
    kept: bool = False
    """Whether the engine has it mapped from before, under that lease, and is not given the handle again."""
    ready_event: bytes = b""
    """With ``kept``: the event that the engine waits for before it reads; empty: the bytes are there."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A host storage: the values of torch's ``UntypedStorage._share_filename_cpu_()``."""

    manager_path: str
    name: str
    size_bytes: int
    loan: int = 0
    """Which hand-over of this memory it is: another number, other bytes."""


Memory = CudaIpcMemory | SharedMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the engine's TP ranks are, each of which opens the memory of the trainer's rank of the same number."""

    device: str = "cpu"
    """"cuda" or "cpu"."""
    num_here: int | None = None
    """Ranks below this are on this host, the others on other nodes; None: all are here."""
    gpu_uuids: tuple[str, ...] = ()
    """By rank, as torch prints them; empty, or an empty string, where that is not known."""
    host_gpus: frozenset[str] = frozenset()
    """UUIDs of this host's GPUs; empty where that is not known."""

    def is_here(self, rank: int) -> bool:
        """Whether that rank runs on this host, where its memory can be seen."""
        return self.num_here is None or rank < self.num_here

    def gpu_of(self, rank: int) -> str:
        """The GPU that it runs on; empty where that is not known."""
        return self.gpu_uuids[rank] if rank < len(self.gpu_uuids) else ""


@cache
def shared_memory_id() -> str:
    """Which /dev/shm this process sees: the kernel's boot, and the number of that file system's instance in it.

    Two processes whose ids are equal can open each other's files there; empty where it cannot be told.
    """
    try:
        return f"{BOOT_ID.read_text().strip()}:{SHM_DIRECTORY.stat().st_dev}"
    except OSError:
        return ""


def is_kept(memory: Memory) -> bool:
    """Whether the engine has it mapped from before."""
    return isinstance(memory, CudaIpcMemory) and memory.kept


def bare_uuid(uuid: str) -> str:
    """A GPU's UUID as torch prints it: without "GPU-", in lower case."""
    return uuid.strip().lower().removeprefix("gpu-")


def check(memory: Memory, needed_bytes: int, where: str, *, here: bool = True) -> None:
    """Raise ``InvalidRequest`` if this handle cannot hold ``needed_bytes`` or has a wrong form.

    ``where`` begins the message, such as "rank 1, bucket 0". ``here``: whether it must exist on this host; otherwise
    what this host does not show is left out.
    """
    if memory.size_bytes < needed_bytes:
        raise _invalid(where, f"the memory handle spans {memory.size_bytes} bytes, the bucket needs {needed_bytes}")
    match memory:
        case CudaIpcMemory():
            _check_cuda(memory, where)
            if here or is_seen(memory):
                _check_counter(memory, where)
        case SharedMemory():
            _check_name(memory.name, "shared memory", where)
            if here or is_seen(memory):
                _check_shared(memory, where)
            if here:
                _check_manager(memory, where)
            else:
                _check_size_and_manager(memory, where)


def is_seen(memory: Memory) -> bool:
    """Whether this host shows the file that tells of this memory; no two files of torch's have one name by chance."""
    name = _file_of(memory)
    return _is_shared_memory_name(name) and os.access(SHM_DIRECTORY / name[1:], os.R_OK | os.W_OK)


def _file_of(memory: Memory) -> str:
    return memory.ref_counter_handle if isinstance(memory, CudaIpcMemory) else memory.name


def let_go(memory: Memory) -> bool:
    """Whether the engine has opened this memory and dropped it again, as its own count says.

    A CUDA export's counter is 1 from the export on, and 0 once the importer has dropped it; a host file's count is 2
    with the importer's share and 1 without (run with torch 2.11, 2.13 and 2.14). A file that is gone says nothing.
    """
    match memory:
        case CudaIpcMemory():
            position = SHM_HEADER_BYTES + COUNTER_BYTES * memory.ref_counter_offset
            return _number(memory.ref_counter_handle, position, COUNTER_BYTES) == 0
        case SharedMemory():
            return _number(memory.name, 0, SHARED_COUNT_BYTES) == 1


def _number(name: str, position: int, length: int) -> int | None:
    """One little-endian number out of a shared-memory file; None if it cannot be read."""
    try:
        with (SHM_DIRECTORY / name[1:]).open("rb") as file:
            file.seek(position)
            found = file.read(length)
    except OSError:
        return None
    return int.from_bytes(found, "little") if len(found) == length else None


def _check_cuda(memory: CudaIpcMemory, where: str) -> None:
    handle = memory.memory_handle
    if not _is_cuda_handle(handle):
        expected = f"{CUDA_HANDLE_BYTES + 2} bytes ({CUDA_HANDLE_BYTES} from old torch), or an expandable segment's"
        raise _invalid(where, f"memory_handle of {len(handle)} bytes is none of torch's; expected {expected}")
    if memory.event_sync_required and len(memory.event_handle) != EVENT_HANDLE_BYTES:
        length = len(memory.event_handle)
        raise _invalid(where, f"event_handle has {length} bytes instead of {EVENT_HANDLE_BYTES}")
    if (
        memory.storage_offset_bytes % STORAGE_ALIGNMENT
        or max(memory.storage_offset_bytes, memory.size_bytes) > MAX_STORAGE_BYTES
    ):
        problem = f"storage_offset_bytes {memory.storage_offset_bytes} and storage_size_bytes {memory.size_bytes} are "
        raise _invalid(where, problem + f"no place in memory; the offset must be a multiple of {STORAGE_ALIGNMENT}")
    if not GPU_UUID.fullmatch(memory.device_uuid):
        raise _invalid(where, f"device_uuid {memory.device_uuid[:64]!r} is not a GPU's UUID")
    _check_name(memory.ref_counter_handle, "reference counters", where)
    if memory.ref_counter_offset >= MAX_COUNTERS:
        raise _invalid(where, f"ref_counter_offset {memory.ref_counter_offset} is past the end of any counters' file")
    if memory.ready_event and len(memory.ready_event) != EVENT_HANDLE_BYTES:
        raise _invalid(where, f"ready_event has {len(memory.ready_event)} bytes instead of {EVENT_HANDLE_BYTES}")
    if (memory.lease or memory.kept) and not LEASE.fullmatch(memory.lease):
        raise _invalid(where, f"lease {memory.lease[:64]!r} is not a lease's name")


def _is_cuda_handle(handle: bytes) -> bool:
    if len(handle) == CUDA_HANDLE_BYTES:
        return True
    if len(handle) == CUDA_HANDLE_BYTES + 2 and handle[1] == CUDA_MALLOC:
        return True
    segments = len(handle) - EXPANDABLE_HEADER_BYTES
    return segments > 0 and segments % 4 == 0 and handle[1] == CUDA_EXPANDABLE_SEGMENT


def _check_counter(memory: CudaIpcMemory, where: str) -> None:
    """The engine writes to this slot without looking: a wrong one is a crash, or another tensor's counter."""
    length = _length_of(memory.ref_counter_handle, "reference counters", where)
    position = SHM_HEADER_BYTES + COUNTER_BYTES * memory.ref_counter_offset
    if position + COUNTER_BYTES > length:
        raise _invalid(where, f"ref_counter_offset {memory.ref_counter_offset} is past the end of the counters' file")
    count = _number(memory.ref_counter_handle, position, COUNTER_BYTES)
    if count != 1:
        raise _invalid(where, f"the reference count of this handle is {count} instead of 1: export the memory anew")


def _check_shared(memory: SharedMemory, where: str) -> None:
    """Opening a missing file or manager raises in the engine, so look first."""
    length = _length_of(memory.name, "shared memory", where)
    if length < memory.size_bytes + SHM_HEADER_BYTES:
        raise _invalid(where, f"shared memory {memory.name} has {length} bytes, too few for {memory.size_bytes}")
    count = _number(memory.name, 0, SHARED_COUNT_BYTES)
    if count is None or count < WITH_THE_ENGINES_SHARE:
        problem = f"the count of shared memory {memory.name} is {count}, without a share for the engine, which would "
        raise _invalid(where, problem + "remove the file: call _shared_incref once before each send")


def _check_manager(memory: SharedMemory, where: str) -> None:
    if not _is_socket(memory.manager_path):
        problem = f"cannot see torch_shm_manager's socket {memory.manager_path[:128]!r}"
        raise _invalid(where, f"{problem}; trainer and engine must share the temporary directory")


def _check_size_and_manager(memory: SharedMemory, where: str) -> None:
    """Of another host: a size that no memory has and a path that no socket has raise in the engine anywhere."""
    if memory.size_bytes > MAX_STORAGE_BYTES:
        raise _invalid(where, f"size_bytes {memory.size_bytes} is no memory's")
    path = memory.manager_path
    if not path.isprintable() or not 0 < len(path.encode()) <= MAX_SOCKET_PATH:
        problem = f"manager_path {path[:128]!r} must be 1 to {MAX_SOCKET_PATH} printable bytes, as the path of a socket"
        raise _invalid(where, problem)


def _check_name(name: str, what: str, where: str) -> None:
    if not _is_shared_memory_name(name):
        raise _invalid(where, f"{what}: {name[:64]!r} is not of the form /name")


def _length_of(name: str, what: str, where: str) -> int:
    """The length of a file in /dev/shm that this user, and so the engine, can open."""
    file = SHM_DIRECTORY / name[1:]
    try:
        status = file.stat()
    except OSError as error:
        problem = f"{what}: cannot see {name} ({error.strerror}); trainer and engine must share /dev/shm"
        raise _invalid(where, problem) from error
    if not S_ISREG(status.st_mode) or not os.access(file, os.R_OK | os.W_OK):
        raise _invalid(where, f"{what}: {name} is no file that this user may open; run trainer and engine as one user")
    return status.st_size


def _is_socket(path: str) -> bool:
    try:
        return Path(path).is_socket()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _is_shared_memory_name(name: str) -> bool:
    return name.startswith("/") and "/" not in name[1:] and name[1:].strip(".") != "" and name.isprintable()


def _invalid(where: str, problem: str) -> InvalidRequest:
    return InvalidRequest(Reason.INVALID_HANDLE, f"{where}: {problem}", where=where)
