"""A rank's memory that another process can open: allocated, described, and proven to be let go.

One ``Export`` is one region, lent to one importer at a time, as often as wanted. It is made over memory of its own
(``adapter.exportable``) or over the trainer's. Life, in the trainer's process:

    Export -> fill -> handle() -> sent -+-> the engine opens it, copies, lets go -> released() -+-> filled again
                 ^                        +-> the engine never saw it, or died     -> reclaim()  -+-> or drop()
                 +--------------------------------------------------------------------------------+

Invariant: memory is dropped or written again only when its count says that nobody else uses it, so the engine never
reads freed memory, and an export that nobody opened does not hold memory for ever.

Facts borrowed (run with torch 2.11, 2.13 and 2.14): a CUDA export's counter is an int64 in /dev/shm, 64 bytes into
the file plus 8 per slot, 1 from the export until the importer has dropped it, then 0. A host file's count is the
int32 at byte 0: 1 when only the exporter holds it, 2 with ``_shared_incref`` for the importer. Two importers at a time
would be one too many for both: the host's count cannot tell them apart, and a process that has a mapping already
lowers the counter of a second one before it has read it. An expandable segment's handle has "e" in its second byte
where a plain allocation's has "c": opening it takes rights (pidfd_getfd) that another container's process lacks.
"""

import os
import secrets
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.dlpack import from_dlpack

from adapter.errors import MemoryNotExportable
from sidecar.v1 import weight_sync_pb2 as pb

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
TORCH_HEADER_BYTES = 64


class Export(ABC):
    """One region of exportable memory."""

    flat: torch.Tensor
    """uint8, one-dimensional, the region's length."""

    @abstractmethod
    def handle(self) -> pb.MemoryHandle:
        """Lend the region to one importer, after the bytes are written; again only once it is released."""

    @abstractmethod
    def released(self) -> bool:
        """Whether nobody but this process holds the region."""

    @abstractmethod
    def reclaim(self) -> None:
        """Take the importer's share back: only where it never opened the region, or died with it."""

    def drop(self) -> None:
        """Give the memory of a released region back, for good: this object itself may live on in a traceback."""
        assert self.released(), "the last importer still holds the region"
        self.flat = torch.empty(0, dtype=torch.uint8)


def export_of(flat: torch.Tensor) -> Export:
    """An export of ``flat``: uint8, one-dimensional, in GPU memory or in a file of torch's in /dev/shm."""
    return CudaExport(flat) if flat.is_cuda else HostExport(flat)


class _CudaLoan(NamedTuple):
    """What torch keeps of one export."""

    alias: torch.Tensor
    counter_file: str
    counter_slot: int


class CudaExport(Export):
    """GPU memory, opened by CUDA IPC in a process that sees the same GPU."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat
        self._loan: _CudaLoan | None = None

    def handle(self) -> pb.MemoryHandle:
        assert self.released(), "the last importer still holds the region"
        # The importer waits for an event on the stream that is current here; the device is synchronised as well,
        # because the bytes may have been written on another one.
        torch.cuda.synchronize(self.flat.device)
        with torch.cuda.device(self.flat.device):
            # Torch wraps the storage that it shares anew at every export, and keeps an event and a counter until the
            # storage is dropped. So what it shares is a tensor of its own over the same memory, dropped with the loan.
            alias = from_dlpack(self.flat)
            shared = _share_cuda(alias)
        _, memory, size, offset, counter_file, counter_slot, event, event_sync = shared
        self._loan = _CudaLoan(alias, counter_file.decode(), counter_slot)
        return pb.MemoryHandle(
            loan=_new_loan(),
            cuda_ipc=pb.CudaIpcHandle(
                device_uuid=str(torch.cuda.get_device_properties(self.flat.device).uuid),
                memory_handle=memory,
                storage_size_bytes=size,
                storage_offset_bytes=offset,
                ref_counter_handle=counter_file.decode(),
                ref_counter_offset=counter_slot,
                event_handle=event,
                event_sync_required=event_sync,
            ),
        )

    def released(self) -> bool:
        if self._loan is not None:
            position = TORCH_HEADER_BYTES + 8 * self._loan.counter_slot
            if _read(self._loan.counter_file, "<q", position) in (None, 0):
                self._loan = None
        return self._loan is None

    def reclaim(self) -> None:
        if self._loan is not None and not self.released():
            torch.UntypedStorage._release_ipc_counter_cuda(self._loan.counter_file.encode(), self._loan.counter_slot)
            self._loan = None


class HostExport(Export):
    """A file in /dev/shm, opened by name through torch's manager process. ``flat`` is all of it."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat
        self._lent_as = ""

    def handle(self) -> pb.MemoryHandle:
        assert self.released(), "the last importer still holds the region"
        storage = self.flat.untyped_storage()
        manager, name, size = storage._share_filename_cpu_()
        storage._shared_incref()  # type: ignore[no-untyped-call]  # the importer lowers the count when it opens the file
        self._lent_as = name.decode()
        return pb.MemoryHandle(
            loan=_new_loan(),
            shared_memory=pb.SharedMemoryHandle(manager_path=manager.decode(), name=name.decode(), size_bytes=size),
        )

    def released(self) -> bool:
        if self._lent_as and _read(self._lent_as, "<i", 0) in (None, 1):
            self._lent_as = ""
        return not self._lent_as

    def reclaim(self) -> None:
        if not self.released():
            self.flat.untyped_storage()._shared_decref()
            self._lent_as = ""


def _new_loan() -> int:
    """The region is the same at every hand-over, its bytes are not: the sidecar must not take one for the other."""
    return secrets.randbits(63) + 1


def _share_cuda(alias: torch.Tensor) -> tuple[Any, ...]:
    try:
        shared: tuple[Any, ...] = alias.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise MemoryNotExportable(
            f"CUDA cannot export this memory on {alias.device} ({str(error).splitlines()[0]}): it comes from a region "
            "of torch_memory_saver, or another pool of virtual memory; allocate what is sent, and call the first "
            "update, outside of it"
        ) from error
    return shared


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
