"""A rank's memory that another process can open: allocated, described, and proven to be let go.

One ``Export`` is one region, sent once, opened by one importer. Life, in the trainer's process:

    allocate -> fill -> handle() -> sent -+-> the engine opens it, copies, lets go -> released() -> dropped
                                          +-> the engine never saw it -> reclaim()  -> dropped

Invariant: memory is dropped only when its count says that nobody uses it, so the engine never reads freed memory
and an export that nobody opened does not hold memory for ever.

Facts borrowed (run with torch 2.11, 2.13 and 2.14): a CUDA export's counter is an int64 in /dev/shm, 64 bytes into
the file plus 8 per slot, 1 from the export until the importer has dropped it, then 0. A host file's count is the
int32 at byte 0: 1 when only the exporter holds it, 2 with ``_shared_incref`` for the importer.
"""

import os
import struct
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from sidecar.v1 import weight_sync_pb2 as pb

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
TORCH_HEADER_BYTES = 64


class Export(ABC):
    """One region of exportable memory."""

    flat: torch.Tensor
    """uint8, one-dimensional, the region's length."""

    @abstractmethod
    def handle(self) -> pb.MemoryHandle:
        """Describe the region for the engine; call it once, after the bytes are written."""

    @abstractmethod
    def released(self) -> bool:
        """Whether nobody but this process holds the region."""

    @abstractmethod
    def reclaim(self) -> None:
        """Take the engine's share back: only for a region that it never opened."""


def allocate(num_bytes: int, device: torch.device) -> Export:
    """A new region on ``device``: a CUDA device, or the host."""
    return CudaExport(num_bytes, device) if device.type == "cuda" else HostExport(num_bytes)


class CudaExport(Export):
    """GPU memory, opened by CUDA IPC in a process that sees the same GPU."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._counter: tuple[str, int] | None = None

    def handle(self) -> pb.MemoryHandle:
        # The importer waits for an event on the stream that is current here; the device is synchronised as well,
        # because the bytes may have been written on another one.
        torch.cuda.synchronize(self.flat.device)
        with torch.cuda.device(self.flat.device):
            shared = self.flat.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        _, memory, size, offset, counter_file, counter_slot, event, event_sync = shared
        self._counter = (counter_file.decode(), counter_slot)
        return pb.MemoryHandle(
            cuda_ipc=pb.CudaIpcHandle(
                device_uuid=str(torch.cuda.get_device_properties(self.flat.device).uuid),
                memory_handle=memory,
                storage_size_bytes=size,
                storage_offset_bytes=offset,
                ref_counter_handle=counter_file.decode(),
                ref_counter_offset=counter_slot,
                event_handle=event,
                event_sync_required=event_sync,
            )
        )

    def released(self) -> bool:
        if self._counter is None:
            return True
        name, slot = self._counter
        return _read(name, "<q", TORCH_HEADER_BYTES + 8 * slot) in (None, 0)

    def reclaim(self) -> None:
        if self._counter is not None and not self.released():
            name, slot = self._counter
            torch.UntypedStorage._release_ipc_counter_cuda(name.encode(), slot)


class HostExport(Export):
    """A file in /dev/shm, opened by name through torch's manager process."""

    def __init__(self, num_bytes: int) -> None:
        self._storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
        self.flat = torch.empty(0, dtype=torch.uint8).set_(self._storage)
        self._name = ""

    def handle(self) -> pb.MemoryHandle:
        manager, name, size = self._storage._share_filename_cpu_()
        self._name = name.decode()
        self._storage._shared_incref()  # type: ignore[no-untyped-call]  # the importer lowers the count when it opens the file
        return pb.MemoryHandle(
            shared_memory=pb.SharedMemoryHandle(manager_path=manager.decode(), name=self._name, size_bytes=size)
        )

    def released(self) -> bool:
        return not self._name or _read(self._name, "<i", 0) in (None, 1)

    def reclaim(self) -> None:
        if not self.released():
            self._storage._shared_decref()


def _read(name: str, form: str, offset: int) -> int | None:
    """One number out of a shared-memory file; None if the file is gone."""
    try:
        descriptor = os.open(SHM / name.lstrip("/"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        (value,) = struct.unpack(form, os.pread(descriptor, struct.calcsize(form), offset))
    finally:
        os.close(descriptor)
    return int(value)
