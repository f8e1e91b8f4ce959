"""Exports that were sent, until each is proven to be let go.

Invariant: an export leaves the ledger only when nobody else holds it: after the engine released it, or after it was
reclaimed because the sidecar said that the engine never saw it. Until then it is kept alive here.
"""

import logging
import time

import torch

from adapter.errors import IncompatibleSidecar, UpdateFailed, UpdateRefused, UpdateStillApplying, WeightSyncError
from adapter.exports import Export

logger = logging.getLogger(__name__)

RELEASE_PATIENCE_S = 10.0
POLL_S = 0.0005


class ExportLedger:
    """One client's exports in flight."""

    def __init__(self) -> None:
        self._held: list[Export] = []
        self._overdue: list[Export] = []
        """Those of them that were waited for in vain: a later update must not wait for them again."""

    @property
    def unreleased_bytes(self) -> int:
        """Bytes that another process may still be reading."""
        return sum(export.flat.numel() for export in self._held if not export.released())

    def hold(self, export: Export) -> None:
        """Keep ``export`` alive from before it is handed over."""
        self._held.append(export)

    def failed(self, export: Export, bucket: int, error: WeightSyncError) -> None:
        """The call that handed ``export`` over as ``bucket`` ended with ``error``."""
        if _never_seen(error, bucket):
            export.reclaim()

    def settle_one(self, export: Export, patience_s: float = RELEASE_PATIENCE_S) -> None:
        """Wait until ``export`` is released, or a moment at most, and drop it."""
        give_up = time.monotonic() + patience_s
        while not export.released() and time.monotonic() < give_up:
            time.sleep(POLL_S)
        self._drop_released()

    def settle(self, patience_s: float = RELEASE_PATIENCE_S) -> None:
        """Drop what is released, waiting a moment for the rest; say so if something is held on to."""
        give_up = time.monotonic() + patience_s
        while self._drop_released() > len(self._overdue) and time.monotonic() < give_up:
            time.sleep(POLL_S)
        self._overdue = list(self._held)
        if self._held:
            logger.warning("the engine still holds %d bytes of this rank; kept until it lets go", self.unreleased_bytes)

    def _drop_released(self) -> int:
        """Let go of what nobody else holds; how many are left."""
        kept = [export for export in self._held if not export.released()]
        dropped_cuda = any(export.flat.is_cuda for export in self._held if export not in kept)
        self._held = kept
        self._overdue = [export for export in self._overdue if export in kept]
        if dropped_cuda:
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # takes the memory out of torch's limbo
        return len(kept)


def _never_seen(error: WeightSyncError, bucket: int) -> bool:
    """Whether the engine was surely never given this bucket's memory."""
    if isinstance(error, UpdateFailed):
        return bucket >= error.num_posted
    if isinstance(error, UpdateRefused | IncompatibleSidecar):
        return True  # also where gRPC itself refused: too large, or a sidecar without that call
    return bool(error.reason) and not isinstance(error, UpdateStillApplying)
