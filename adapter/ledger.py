"""Exports that were sent, until each is proven to be let go.

Invariant: an export leaves the ledger only when nobody else holds it: after the engine released it, or after it was
reclaimed because the engine never saw it, or died with it. Until then it is kept alive here. Every hand-over ends in
one of the two, since what the call itself did not learn is asked for later (``revisit``).

What follows there from the engine's scheduler taking one request after another: once it has answered anything, what
was posted before is dealt with, and was let go if it was opened at all. So memory of a failed call is out of use when
the sidecar was started since (it has been answered), or when the engine is no longer dirty (a complete update was).
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapter.errors import (
    IncompatibleSidecar,
    SidecarUnreachable,
    UpdateFailed,
    UpdateRefused,
    UpdateStillApplying,
    WeightSyncError,
)
from adapter.exports import Export
from sidecar.v1 import weight_sync_pb2 as pb

logger = logging.getLogger(__name__)

RELEASE_PATIENCE_S = 10.0
POLL_S = 0.0005
ENDED = (pb.UPDATE_STATE_COMMITTED, pb.UPDATE_STATE_ABORTED, pb.UPDATE_STATE_FAILED)

OutcomeOf = Callable[[str], pb.UpdateOutcome | None]
"""An update's outcome by its id; None if the sidecar does not know it."""


@dataclass(slots=True, eq=False)
class Held:
    """One export that was handed over."""

    export: Export
    update_id: str
    bucket: int
    loaded: bool = False
    """Whether its own call was answered well: then only the count tells that the engine is done with it."""


class ExportLedger:
    """One client's exports in flight. ``keeps`` tells which regions outlive an update: those are not dropped."""

    def __init__(self, keeps: Callable[[Export], bool] = lambda _: False) -> None:
        self._keeps = keeps
        self._held: list[Held] = []
        self._overdue = 0
        """How many of them were waited for in vain: a later update must not wait for them again."""

    @property
    def unreleased_bytes(self) -> int:
        """Bytes that another process may still be reading."""
        return sum(held.export.flat.numel() for held in self._held if not held.export.released())

    def hold(self, export: Export, update_id: str, bucket: int) -> None:
        """Keep ``export`` alive from before it is handed over."""
        # One that is used again was let go before: what became of that update is no longer about this memory.
        self._held = [held for held in self._held if held.export is not export]
        self._held.append(Held(export, update_id, bucket))

    def failed(self, export: Export, bucket: int, error: WeightSyncError) -> None:
        """The call that handed ``export`` over as ``bucket`` ended with ``error``."""
        if _never_seen(error, bucket):
            export.reclaim()

    def revisit(self, outcome_of: OutcomeOf, engine_epoch: int, *, rank: int | None = None, dirty: bool = True) -> None:
        """Take back what is out of use by now: never seen by the engine, dealt with, or held by a dead one.

        To be called while no call of this ``rank`` is under way. ``engine_epoch`` and ``dirty`` (whether the engine
        holds weights of no one version) are what the sidecar says now.
        """
        for held in self._held:
            if held.export.released():
                continue
            outcome = outcome_of(held.update_id)
            if held.loaded:
                out_of_use = outcome is not None and outcome.engine_epoch != engine_epoch
            else:
                out_of_use = outcome is None or _out_of_use(outcome, held.bucket, engine_epoch, rank, dirty)
            if out_of_use:
                held.export.reclaim()

    def settle_one(self, export: Export, patience_s: float = RELEASE_PATIENCE_S) -> None:
        """Wait until ``export``, which was loaded, is released, or a moment at most, and drop it."""
        for held in self._held:
            held.loaded |= held.export is export
        export.answered()
        give_up = time.monotonic() + patience_s
        while not export.released() and time.monotonic() < give_up:
            time.sleep(POLL_S)
        self._drop_released()

    def settle(self, patience_s: float = RELEASE_PATIENCE_S) -> None:
        """Drop what is released, waiting a moment for the rest; say so if something is held on to."""
        give_up = time.monotonic() + patience_s
        while self._drop_released() > self._overdue and time.monotonic() < give_up:
            time.sleep(POLL_S)
        self._overdue = len(self._held)
        if self._held:
            logger.warning("the engine still holds %d bytes of this rank; kept until it lets go", self.unreleased_bytes)

    def _drop_released(self) -> int:
        """Let go of what nobody else holds; how many are left."""
        kept = [held for held in self._held if not held.export.released()]
        dropped = [held.export for held in self._held if held not in kept]
        on_gpu = any(export.flat.is_cuda for export in dropped)
        self._held = kept
        self._overdue = min(self._overdue, len(kept))
        for export in dropped:
            if not self._keeps(export):
                export.drop()
        if on_gpu:
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # removes torch's file of counters when none is in use
        return len(kept)


def _never_seen(error: WeightSyncError, bucket: int) -> bool:
    """Whether the engine was surely never given this bucket's memory, or has died with it."""
    if isinstance(error, UpdateFailed):
        return error.num_posted is not None and bucket >= error.num_posted
    if isinstance(error, UpdateRefused | IncompatibleSidecar):
        return True  # also where gRPC itself refused: too large, or a sidecar without that call
    if isinstance(error, SidecarUnreachable) and error.took_nothing:
        return True
    return bool(error.reason) and not isinstance(error, UpdateStillApplying)


def _out_of_use(outcome: pb.UpdateOutcome, bucket: int, engine_epoch: int, rank: int | None, dirty: bool) -> bool:
    """Whether nobody reads memory any more that was handed over as ``bucket`` of this update, by a call that failed."""
    never_posted = bucket >= outcome.num_posted_ever  # over all attempts: the id may have been used again since
    if outcome.state == pb.UPDATE_STATE_COLLECTING and rank in outcome.waiting_for_ranks:
        return never_posted  # other ranks have begun it anew, without this memory
    if outcome.state not in ENDED:
        return False
    return never_posted or outcome.engine_epoch != engine_epoch or not dirty
