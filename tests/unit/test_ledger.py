"""What becomes of memory that was handed over, by how the call ended."""

import gc
import logging
import time
from collections.abc import Iterator

import pytest
import torch

from adapter.errors import (
    IncompatibleSidecar,
    RanksMissing,
    SidecarUnreachable,
    UpdateAborted,
    UpdateFailed,
    UpdateRefused,
    UpdateStillApplying,
    WeightSyncError,
)
from adapter.exportable import allocate_flat
from adapter.exports import Export, HostExport
from adapter.ledger import ExportLedger
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import shared_memory
from tests.fakes.shared_memory import files_of_this_process


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = files_of_this_process()
    yield
    gc.collect()
    assert files_of_this_process() <= before


@pytest.fixture
def ledger() -> ExportLedger:
    return ExportLedger()


def sent(ledger: ExportLedger) -> tuple[Export, str]:
    """An export that was handed over, and its file's name."""
    export = HostExport(allocate_flat(128, torch.device("cpu")))
    export.flat.copy_(torch.zeros(128, dtype=torch.uint8))
    name = export.handle().shared_memory.name
    ledger.hold(export, "update", 0)
    return export, name


def test_memory_counts_as_unreleased_until_the_engine_let_go(ledger: ExportLedger) -> None:
    _, name = sent(ledger)
    assert ledger.unreleased_bytes == 128
    shared_memory.release(name)
    assert ledger.unreleased_bytes == 0
    ledger.settle()


@pytest.mark.parametrize(
    "error",
    [
        UpdateRefused("refused", reason="INVALID_TENSOR"),
        UpdateRefused("too large, said gRPC itself"),
        IncompatibleSidecar("no such call, said gRPC itself"),
        UpdateAborted("aborted", reason="RANKS_DIFFER"),
        RanksMissing("missing", reason="RANKS_MISSING"),
        SidecarUnreachable("draining", reason="DRAINING"),
        UpdateFailed("failed", reason="UPDATE_FAILED", details={"numPosted": "0"}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_the_engine_never_saw_is_reclaimed(ledger: ExportLedger, error: WeightSyncError) -> None:
    export, _ = sent(ledger)
    ledger.failed(export, 0, error)
    assert ledger.unreleased_bytes == 0
    ledger.settle()


@pytest.mark.parametrize(
    "error",
    [
        UpdateStillApplying("still", reason="STILL_APPLYING"),
        UpdateFailed("failed", reason="UPDATE_FAILED", details={"numPosted": "1"}),
        SidecarUnreachable("the connection broke: who knows"),
        WeightSyncError("no answer in time"),
    ],
    ids=["still-applying", "posted", "connection-lost", "deadline-of-the-client"],
)
def test_memory_that_the_engine_may_read_is_kept(
    ledger: ExportLedger, error: WeightSyncError, caplog: pytest.LogCaptureFixture
) -> None:
    export, name = sent(ledger)
    ledger.failed(export, 0, error)
    with caplog.at_level(logging.WARNING):
        ledger.settle(patience_s=0.02)
    assert ledger.unreleased_bytes == 128
    assert "the engine still holds 128 bytes of this rank" in caplog.text
    shared_memory.release(name)
    ledger.settle()
    assert ledger.unreleased_bytes == 0


def test_memory_goes_back_at_once_even_while_somebody_still_names_the_export(ledger: ExportLedger) -> None:
    before = files_of_this_process()
    export, name = sent(ledger)
    shared_memory.release(name)
    ledger.settle()
    assert files_of_this_process() == before
    assert export.released()


def test_settling_one_waits_for_that_one_and_drops_all_that_are_free(ledger: ExportLedger) -> None:
    first, first_name = sent(ledger)
    _, second_name = sent(ledger)
    shared_memory.release(second_name)
    shared_memory.release(first_name)
    ledger.settle_one(first)
    assert ledger.unreleased_bytes == 0


def test_settling_does_not_wait_again_for_what_outlived_its_patience(ledger: ExportLedger) -> None:
    """An engine that died holds its share for ever; later updates must not each wait for it."""
    _, name = sent(ledger)
    ledger.settle(patience_s=0.02)
    started = time.monotonic()
    ledger.settle(patience_s=30.0)
    assert time.monotonic() - started < 15.0
    assert ledger.unreleased_bytes == 128
    shared_memory.release(name)
    ledger.settle()


@pytest.mark.parametrize(
    ("state", "num_posted", "epoch", "released"),
    [
        pytest.param(pb.UPDATE_STATE_APPLYING, 0, 1, False, id="still-going-on"),
        pytest.param(pb.UPDATE_STATE_ABORTED, 0, 1, True, id="aborted"),
        pytest.param(pb.UPDATE_STATE_FAILED, 0, 1, True, id="failed-before-it"),
        pytest.param(pb.UPDATE_STATE_FAILED, 1, 1, False, id="failed-with-it"),
        pytest.param(pb.UPDATE_STATE_ABORTED, 1, 1, False, id="aborted-after-an-attempt-that-was-posted"),
        pytest.param(pb.UPDATE_STATE_FAILED, 1, 2, True, id="the-engine-died-with-it"),
    ],
)
def test_memory_is_taken_back_once_the_sidecar_knows_that_nobody_uses_it(
    ledger: ExportLedger, state: pb.UpdateState.ValueType, num_posted: int, epoch: int, released: bool
) -> None:
    _, name = sent(ledger)
    outcome = pb.UpdateOutcome(state=state, num_posted_ever=num_posted, engine_epoch=1)
    ledger.revisit({"update": outcome}.get, epoch)
    assert (ledger.unreleased_bytes == 0) is released
    if not released:
        shared_memory.release(name)
    ledger.settle()


def test_memory_of_an_update_that_the_sidecar_does_not_know_is_taken_back(ledger: ExportLedger) -> None:
    """It was started since, and its engine's scheduler has answered it after all that a predecessor may have posted."""
    sent(ledger)
    ledger.revisit(lambda _: None, 1)
    assert ledger.unreleased_bytes == 0
    ledger.settle()


@pytest.mark.parametrize(
    ("waits_for", "num_posted", "released"),
    [
        pytest.param([1], 0, True, id="begun-anew-by-others"),
        pytest.param([0], 0, False, id="delivered"),
        pytest.param([1], 1, False, id="begun-anew-after-an-attempt-that-was-posted"),
    ],
)
def test_memory_is_not_part_of_an_update_that_still_waits_for_its_rank(
    ledger: ExportLedger, waits_for: list[int], num_posted: int, released: bool
) -> None:
    _, name = sent(ledger)
    outcome = pb.UpdateOutcome(
        state=pb.UPDATE_STATE_COLLECTING, waiting_for_ranks=waits_for, num_posted_ever=num_posted, engine_epoch=1
    )
    ledger.revisit({"update": outcome}.get, 1, rank=1)
    assert (ledger.unreleased_bytes == 0) is released
    if not released:
        shared_memory.release(name)
    ledger.settle()


@pytest.mark.parametrize("state", [pb.UPDATE_STATE_FAILED, pb.UPDATE_STATE_COMMITTED])
def test_memory_that_was_posted_in_vain_is_taken_back_once_the_engine_is_whole_again(
    ledger: ExportLedger, state: pb.UpdateState.ValueType
) -> None:
    """Healed under another id, or by the next attempt under the same one."""
    sent(ledger)
    outcome = pb.UpdateOutcome(state=state, num_posted_ever=1, engine_epoch=1)
    ledger.revisit({"update": outcome}.get, 1, dirty=True)
    assert ledger.unreleased_bytes == 128
    ledger.revisit({"update": outcome}.get, 1, dirty=False)
    assert ledger.unreleased_bytes == 0
    ledger.settle()


def test_memory_that_was_loaded_is_taken_back_only_from_a_dead_engine(ledger: ExportLedger) -> None:
    export, _ = sent(ledger)
    ledger.settle_one(export, patience_s=0.01)
    outcome = pb.UpdateOutcome(state=pb.UPDATE_STATE_COMMITTED, num_posted_ever=1, engine_epoch=1)
    ledger.revisit({"update": outcome}.get, 1, dirty=False)
    ledger.revisit(lambda _: None, 1, dirty=False)
    assert ledger.unreleased_bytes == 128
    ledger.revisit({"update": outcome}.get, 2, dirty=False)
    assert ledger.unreleased_bytes == 0
    ledger.settle()


def test_a_region_that_is_handed_over_again_is_not_taken_back_for_what_it_carried_before(ledger: ExportLedger) -> None:
    export, name = sent(ledger)
    shared_memory.release(name)
    assert export.released()
    export.handle()
    ledger.hold(export, "next", 0)
    aborted = pb.UpdateOutcome(state=pb.UPDATE_STATE_ABORTED, engine_epoch=1)
    applying = pb.UpdateOutcome(state=pb.UPDATE_STATE_APPLYING, num_posted_ever=1, engine_epoch=1)
    ledger.revisit({"update": aborted, "next": applying}.get, 1)
    assert ledger.unreleased_bytes == 128
    shared_memory.release(name)
    ledger.settle()
