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

import logging
import os
import secrets
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.dlpack import from_dlpack

from adapter.errors import MemoryNotExportable
from adapter.lease import Lease
from sidecar.v1 import weight_sync_pb2 as pb

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
TORCH_HEADER_BYTES = 64
LET_GO_PATIENCE_S = 5.0


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

    @abstractmethod
    def answered(self) -> None:
        """The engine has answered for the load of what was lent, so it has read it."""

    @abstractmethod
    def let_go(self) -> None:
        """Have an engine that keeps the region mapped close it, for a region that is not being read."""

    def drop(self) -> None:
        """Give the memory of a released region back, for good: this object itself may live on in a traceback."""
        assert self.released(), "the last importer still holds the region"
        self.let_go()
        self.flat = torch.empty(0, dtype=torch.uint8)


def export_of(flat: torch.Tensor) -> Export:
    """An export of ``flat``: uint8, one-dimensional, in GPU memory or in a file of torch's in /dev/shm."""
    return CudaExport(flat, may_be_kept=True) if flat.is_cuda else HostExport(flat)


class _CudaLoan(NamedTuple):
    """One of torch's exports."""

    alias: torch.Tensor
    handle: pb.CudaIpcHandle

    @property
    def counter_file(self) -> str:
        """Where its reference counter is."""
        return self.handle.ref_counter_handle

    @property
    def counter_slot(self) -> int:
        """Which of the file's it is."""
        return self.handle.ref_counter_offset

    @property
    def position(self) -> int:
        """Its byte in the file."""
        return TORCH_HEADER_BYTES + 8 * self.counter_slot


class CudaExport(Export):
    """GPU memory, opened by CUDA IPC in a process that sees the same GPU.

    With a lease (``adapter.lease``) an engine may keep it mapped when it has read it. It is then lent again by the same
    handle, whose counter stays 1; what the engine was given is told by its answers, and whether it has the memory
    mapped by its lock.
    """

    def __init__(self, flat: torch.Tensor, *, may_be_kept: bool = False) -> None:
        self.flat = flat
        self._may_be_kept = may_be_kept
        self._lease: Lease | None = None
        self._loan: _CudaLoan | None = None
        self._being_read = False
        """Whether it was lent, and neither answered for nor taken back."""
        self._kept = False
        """Whether it was seen to be mapped while it was not being read."""

    def handle(self) -> pb.MemoryHandle:
        assert self.released(), "the last importer still holds the region"
        # The importer waits for an event on the stream that is current here; the device is synchronised as well,
        # because the bytes may have been written on another one, and a mapping that is kept waits for nothing.
        torch.cuda.synchronize(self.flat.device)
        self._being_read = True
        if self._loan is None:
            self._loan = self._new_loan()
            self._kept = False
        return pb.MemoryHandle(loan=_new_loan_number(), cuda_ipc=self._described(self._loan))

    def released(self) -> bool:
        if self._loan is not None and _read(self._loan.counter_file, "<q", self._loan.position) in (None, 0):
            self._loan = None
        if self._loan is None or self._being_read:
            return self._loan is None
        if self._is_mapped():
            return True
        if self._kept:  # whoever kept it is gone without lowering the counter
            self._take_back()
        return self._loan is None

    def answered(self) -> None:
        self._being_read = False
        self._kept = self._is_mapped()

    def reclaim(self) -> None:
        if self.released():
            return
        self._being_read = False
        self._kept = self._is_mapped()
        if not self._kept:
            self._take_back()

    def let_go(self) -> None:
        if self._lease is not None and self.released() and not self._lease.end(LET_GO_PATIENCE_S):
            logger.warning("the engine still has %d bytes mapped that it was asked to let go", self.flat.numel())
        self._lease = None

    def _new_loan(self) -> _CudaLoan:
        if self._may_be_kept:
            self._lease = Lease()
        with torch.cuda.device(self.flat.device):
            # Torch wraps the storage that it shares anew at every export, and keeps an event and a counter until the
            # storage is dropped. So what it shares is a tensor of its own over the same memory, dropped with the loan.
            alias = from_dlpack(self.flat)
            _, memory, size, offset, counter_file, counter_slot, event, event_sync = _share_cuda(alias)
        handle = pb.CudaIpcHandle(
            device_uuid=str(torch.cuda.get_device_properties(self.flat.device).uuid),
            memory_handle=memory,
            storage_size_bytes=size,
            storage_offset_bytes=offset,
            ref_counter_handle=counter_file.decode(),
            ref_counter_offset=counter_slot,
            event_handle=event,
            event_sync_required=event_sync,
            lease=self._lease.name if self._lease else "",
        )
        return _CudaLoan(alias, handle)

    def _described(self, loan: _CudaLoan) -> pb.CudaIpcHandle:
        handle = pb.CudaIpcHandle()
        handle.CopyFrom(loan.handle)
        handle.kept = self._kept
        return handle

    def _is_mapped(self) -> bool:
        return self._lease is not None and self._lease.is_kept()

    def _take_back(self) -> None:
        assert self._loan is not None
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
            loan=_new_loan_number(),
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

    def answered(self) -> None:
        """Nobody keeps host memory mapped: its own count says all."""

    def let_go(self) -> None:
        """The same."""


def _new_loan_number() -> int:
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
