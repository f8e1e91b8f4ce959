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

import ctypes
import logging
import os
import secrets
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
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
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID, cuda.h


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
    def ask_back(self) -> None:
        """Ask an engine that keeps the region mapped to close it, without waiting, unless it is being read."""

    @abstractmethod
    def let_go(self, give_up: float | None = None) -> None:
        """Ask, and wait until it is closed: till ``give_up`` on the monotonic clock, or five seconds."""

    def drop(self) -> None:
        """Give the memory of a released region back, for good: this object itself may live on in a traceback."""
        assert self.released(), "the last importer still holds the region"
        self.let_go()  # what is mapped all the same is torch's to keep until its counter says so
        self.flat = torch.empty(0, dtype=torch.uint8)


def export_of(flat: torch.Tensor, *, written_here: bool = False) -> Export:
    """An export of ``flat``: uint8, one-dimensional, in GPU memory or in a file of torch's in /dev/shm.

    ``written_here``: its bytes come from this process's current stream alone, so that they need not be waited for here.
    """
    return CudaExport(flat, may_be_kept=True, written_here=written_here) if flat.is_cuda else HostExport(flat)


def let_all_go(exports: Iterable[Export]) -> None:
    """Have an engine close all of them; five seconds at most for all together."""
    listed = list(exports)
    for export in listed:
        export.ask_back()
    give_up = time.monotonic() + LET_GO_PATIENCE_S
    for export in listed:
        export.let_go(give_up)


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

    def __init__(self, flat: torch.Tensor, *, may_be_kept: bool = False, written_here: bool = False) -> None:
        self.flat = flat
        self._ready = _shared_event() if written_here else None
        """Recorded when what was queued on this process's stream has written the region, if nothing else writes it."""
        self._may_be_kept = may_be_kept
        self._lease: Lease | None = None
        self._loan: _CudaLoan | None = None
        self._being_read = False
        """Whether it was lent, and neither answered for nor taken back."""
        self._kept = False
        """Whether it was seen to be mapped while it was not being read."""
        self._asked_back = False
        """Whether the engine was asked to close what it keeps."""
        self._allocation: int | None = None
        """What the driver calls the allocation that was lent; None: not known, so that nothing is kept of it."""

    def handle(self) -> pb.MemoryHandle:
        assert self.released(), "the last importer still holds the region"
        if self._loan is not None and not self._is_same_memory():
            self.let_go()
            if self._loan is not None:
                raise MemoryNotExportable(
                    f"the engine still maps {self.flat.numel()} bytes that this trainer has freed and allocated again "
                    "at the same address; send again once it answers, or restart it"
                )
        self._being_read = True
        if self._loan is None:
            # The importer waits for an event on the stream that is current here; the device is synchronised as well,
            # because the bytes may have been written on another one, and a mapping that is open waits for nothing.
            self._synchronize()
            self._loan = self._new_loan()
            self._kept = False
            return pb.MemoryHandle(loan=_new_loan_number(), cuda_ipc=self._loan.handle)
        handle = pb.CudaIpcHandle()
        handle.CopyFrom(self._loan.handle)
        handle.kept, handle.ready_event = self._kept, self._when_ready()
        return pb.MemoryHandle(loan=_new_loan_number(), cuda_ipc=handle)

    def released(self) -> bool:
        mapped = self._is_mapped()  # first: an engine that lets go lowers the counter, and unlocks then
        if self._loan is not None and (_read(self._loan.counter_file, "<q", self._loan.position) or 0) <= 0:
            self._loan = None
        if self._loan is None or self._being_read:
            return self._loan is None
        if mapped:
            return not self._asked_back
        if self._kept:  # whoever kept it is gone without lowering the counter
            self._take_back()
        return self._loan is None

    def answered(self) -> None:
        self._being_read = False
        self._kept = self._is_mapped()
        if not self._kept and self._lease is not None:
            self._lease.end(0)  # nobody has taken it
            self._lease = None

    def reclaim(self) -> None:
        if self.released():
            return
        self._being_read = False
        self._kept = self._is_mapped()
        if not self._kept:
            self._take_back()

    def ask_back(self) -> None:
        if self._lease is not None and self.released():
            self._asked_back = True
            self._lease.ask_back()

    def let_go(self, give_up: float | None = None) -> None:
        self.ask_back()
        if self._lease is None or not self._asked_back:
            return
        if self._lease.end(LET_GO_PATIENCE_S if give_up is None else max(0.0, give_up - time.monotonic())):
            self._lease = None
            self.released()  # sees what the engine has left of the loan
        else:  # the region stays lent until it is closed
            logger.warning("the engine still has %d bytes mapped that it was asked to let go", self.flat.numel())

    def _new_loan(self) -> _CudaLoan:
        self._asked_back = False
        if self._may_be_kept:
            self._lease = Lease()
        with torch.cuda.device(self.flat.device):
            # Torch wraps the storage that it shares anew at every export, and keeps an event and a counter until the
            # storage is dropped. So what it shares is a tensor of its own over the same memory, dropped with the loan.
            self._allocation = allocation_id(self.flat.data_ptr())
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

    def _is_same_memory(self) -> bool:
        """Whether the region is still the allocation that the engine has mapped, and not another at its address.

        A trainer may free its storage and get as much again, at the same place (``resize_(0)`` when it offloads).
        """
        if self._ready is not None:  # staging memory is nobody else's
            return True
        self._synchronize()
        return self._allocation is not None and self._allocation == allocation_id(self.flat.data_ptr())

    def _when_ready(self) -> bytes:
        """The event that an engine which keeps the region waits for; empty if the bytes are there."""
        if self._ready is None:
            self._synchronize()
            return b""
        self._ready.record(torch.cuda.current_stream(self.flat.device))
        event: bytes = self._ready.ipc_handle()  # type: ignore[no-untyped-call]
        return event

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self.flat.device)

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

    def ask_back(self) -> None:
        """The same."""

    def let_go(self, give_up: float | None = None) -> None:
        """The same."""


def _new_loan_number() -> int:
    """The region is the same at every hand-over, its bytes are not: the sidecar must not take one for the other."""
    return secrets.randbits(63) + 1


def allocation_id(address: int) -> int | None:
    """The driver's number of the allocation at ``address``, new for each one; None where it does not tell."""
    driver = _driver()
    if driver is None:
        return None
    number = ctypes.c_uint64()
    attribute = ctypes.c_int(_BUFFER_ID)
    failed = driver.cuPointerGetAttribute(ctypes.byref(number), attribute, ctypes.c_uint64(address))
    return None if failed else number.value


@cache
def _driver() -> ctypes.CDLL | None:
    """Opened once: that takes a fifth of a millisecond, of each update in place."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _shared_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(interprocess=True)  # type: ignore[no-untyped-call]
    return event


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
