"""Exports that were sent, until each is proven to be let go.

Invariant: an export leaves the ledger only when nobody else holds it: after the engine released it, or after it was
reclaimed because the engine never saw it, or died with it. Until then it is kept alive here.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapter.errors import IncompatibleSidecar, UpdateFailed, UpdateRefused, UpdateStillApplying, WeightSyncError
from adapter.exports import Export
from sidecar.v1 import weight_sync_pb2 as pb

logger = logging.getLogger(__name__)

RELEASE_PATIENCE_S = 10.0
POLL_S = 0.0005
ENDED = (pb.UPDATE_STATE_COMMITTED, pb.UPDATE_STATE_ABORTED, pb.UPDATE_STATE_FAILED)

OutcomeOf = Callable[[str], pb.UpdateOutcome | None]
"""An update's outcome by its id; None if the sidecar does not know it."""


@dataclass(frozen=True, slots=True)
class Held:
    """One export that was handed over."""

    export: Export
    update_id: str
    bucket: int


class ExportLedger:
    """One client's exports in flight."""

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._overdue = 0
        """How many of them were waited for in vain: a later update must not wait for them again."""

    @property
    def unreleased_bytes(self) -> int:
        """Bytes that another process may still be reading."""
        return sum(held.export.flat.numel() for held in self._held if not held.export.released())

    def hold(self, export: Export, update_id: str, bucket: int) -> None:
        """Keep ``export`` alive from before it is handed over."""
        self._held.append(Held(export, update_id, bucket))

    def failed(self, export: Export, bucket: int, error: WeightSyncError) -> None:
        """The call that handed ``export`` over as ``bucket`` ended with ``error``."""
        if _never_seen(error, bucket):
            export.reclaim()

    def revisit(self, outcome_of: OutcomeOf, engine_epoch: int) -> None:
        """Take back what the sidecar by now knows to be out of use: never seen by the engine, or held by a dead one."""
        for held in self._held:
            if not held.export.released():
                outcome = outcome_of(held.update_id)
                if outcome is not None and _out_of_use(outcome, held.bucket, engine_epoch):
                    held.export.reclaim()

    def settle_one(self, export: Export, patience_s: float = RELEASE_PATIENCE_S) -> None:
        """Wait until ``export`` is released, or a moment at most, and drop it."""
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
        dropped = [held for held in self._held if held not in kept]
        self._held = kept
        self._overdue = min(self._overdue, len(kept))
        if any(held.export.flat.is_cuda for held in dropped):
            del dropped
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # takes the memory out of torch's limbo
        return len(kept)


def _never_seen(error: WeightSyncError, bucket: int) -> bool:
    """Whether the engine was surely never given this bucket's memory, or has died with it."""
    if isinstance(error, UpdateFailed):
        return error.num_posted is not None and bucket >= error.num_posted
    if isinstance(error, UpdateRefused | IncompatibleSidecar):
        return True  # also where gRPC itself refused: too large, or a sidecar without that call
    return bool(error.reason) and not isinstance(error, UpdateStillApplying)


def _out_of_use(outcome: pb.UpdateOutcome, bucket: int, engine_epoch: int) -> bool:
    if outcome.state not in ENDED:
        return False
    # Over all attempts: the id may have been used again since this memory was handed over.
    return bucket >= outcome.num_posted_ever or outcome.engine_epoch != engine_epoch
