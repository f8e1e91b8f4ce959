"""The life of an export of GPU memory, without a GPU: a real lease, and a counter as torch's, in /dev/shm."""

import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter.errors import MemoryNotExportable
from adapter.exports import TORCH_HEADER_BYTES, CudaExport, _CudaLoan
from adapter.lease import KeptUnder, Lease
from sidecar.v1 import weight_sync_pb2 as pb


class Export(CudaExport):
    """Everything but what asks a GPU."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8, dtype=torch.uint8), may_be_kept=True)
        self.counter = Path("/dev/shm") / f"torch_{secrets.token_hex(8)}"
        self.moved = False

    def set_counter(self, value: int) -> None:
        self.counter.write_bytes(bytes(TORCH_HEADER_BYTES) + struct.pack("<q", value))

    def count(self) -> int:
        (value,) = struct.unpack("<q", self.counter.read_bytes()[TORCH_HEADER_BYTES:])
        return int(value)

    def _new_loan(self) -> _CudaLoan:
        self._lease, self._asked_back = Lease(), False
        self.set_counter(1)
        handle = pb.CudaIpcHandle(ref_counter_handle=f"/{self.counter.name}", lease=self._lease.name)
        return _CudaLoan(self.flat, handle)

    def _take_back(self) -> None:
        self.set_counter(self.count() - 1)
        self._loan = None

    def _synchronize(self) -> None:
        """There is no device."""

    def _is_same_memory(self) -> bool:
        return not self.moved


@pytest.fixture
def export() -> Iterator[Export]:
    made = Export()
    yield made
    made.counter.unlink(missing_ok=True)


class Engine:
    """Keeps what it is lent, as the replay loader does."""

    def __init__(self, export: Export, handle: pb.MemoryHandle) -> None:
        self._export = export
        self._under = KeptUnder(handle.cuda_ipc.lease)

    def let_go(self) -> None:
        """The mapping first, the lock then."""
        self._export.set_counter(self._export.count() - 1)
        self._under.let_go()

    def die(self) -> None:
        """The counter stays as it is."""
        self._under.let_go()


def lent_and_kept(export: Export) -> Engine:
    engine = Engine(export, export.handle())
    export.answered()
    return engine


def test_what_the_engine_keeps_is_lent_again_without_a_new_handle(export: Export) -> None:
    first = export.handle()
    engine = Engine(export, first)
    assert not export.released()
    export.answered()
    assert export.released()
    second = export.handle()
    assert (second.cuda_ipc.lease, second.cuda_ipc.kept) == (first.cuda_ipc.lease, True)
    assert second.loan != first.loan
    assert not export.released()
    export.answered()
    engine.let_go()
    assert export.released()
    assert not export.handle().cuda_ipc.kept


def test_what_the_engine_does_not_keep_has_no_lease_afterwards(export: Export) -> None:
    lease = export.handle().cuda_ipc.lease
    export.set_counter(0)
    export.answered()
    assert export.released()
    assert not (Path("/dev/shm") / lease).exists()


def test_an_engine_that_dies_with_what_it_keeps_leaves_the_memory_to_its_owner_once(export: Export) -> None:
    lent_and_kept(export).die()
    assert export.released()
    assert export.count() == 0
    assert export.released()
    assert export.count() == 0


def test_a_failed_call_leaves_memory_that_the_engine_keeps_to_be_lent_again(export: Export) -> None:
    engine = lent_and_kept(export)
    export.handle()
    export.reclaim()
    assert export.released()
    assert export.count() == 1
    engine.let_go()
    assert export.released()


def test_memory_that_is_asked_back_in_vain_stays_lent_until_it_is_closed(export: Export) -> None:
    engine = lent_and_kept(export)
    export.let_go(give_up=0.0)
    assert not export.released()
    assert export.count() == 1
    engine.let_go()
    assert export.released()
    assert export.count() == 0


def test_memory_at_the_same_address_that_is_another_allocation_is_lent_anew(export: Export) -> None:
    engine = lent_and_kept(export)
    export.moved = True
    with pytest.raises(MemoryNotExportable, match="freed and allocated again"):
        _without_patience(export)
    engine.let_go()
    assert not export.handle().cuda_ipc.kept


def _without_patience(export: Export) -> None:
    export.let_go(give_up=0.0)
    export._asked_back = False
    export.handle()
