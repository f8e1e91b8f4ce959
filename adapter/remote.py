"""One engine that shares no memory with its trainer: the same call, over torch.distributed.

Runs in every rank of the trainer. Rank 0 is a fleet of one; the others gather along, since the weights may be sharded
over all of them, and learn from the sidecar how it went. Invariant: what is raised is the sidecar's own verdict; where
rank 0 fails before the sidecar hears of the update, the others learn nothing, and wait for their own time to pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from adapter import wire
from adapter.bucketed import take_part
from adapter.credentials import Credentials
from adapter.errors import RanksMissing, UpdateAborted, UpdateFailed, WeightSyncError
from adapter.fleet import Fleet, FleetUpdateFailed
from adapter.planner import TensorSpec
from adapter.sources.lazy import NamedTensors
from adapter.wire import UpdateResult
from sidecar.v1 import weight_sync_pb2 as pb

POLL_S = 0.05
TRANSFER_S = 600.0
"""One engine keeps no others waiting: as long as the sidecar gives one bucket."""
OutcomeOf = Callable[[str], pb.UpdateOutcome]


class RemoteUpdates:
    """One rank's updates of one engine."""

    def __init__(
        self,
        target: str,
        rank: int,
        outcome_of: OutcomeOf,
        *,
        credentials: Credentials,
        bucket_bytes: int,
        staging_buffers: int,
        device: torch.device | None,
        fused_groups: Sequence[str],
    ) -> None:
        self._target = target
        self._rank = rank
        self._outcome_of = outcome_of
        self._fleet = Fleet(
            [target],
            credentials=credentials,
            bucket_bytes=bucket_bytes,
            staging_buffers=staging_buffers,
            device=device,
            fused_groups=fused_groups,
            transfer_timeout=TRANSFER_S,
        )

    def update(
        self,
        named_tensors: NamedTensors,
        specs: Sequence[TensorSpec] | None,
        *,
        version: str,
        update_id: str,
        timeout: float,
        **options: Any,
    ) -> UpdateResult:
        """Send one version, or help to; returns when the engine serves it. ``options``: as ``Fleet`` takes them.

        Raises ``WeightSyncError`` or ``ValueError``.
        """
        if self._rank:
            return self._follow(named_tensors, specs, update_id, timeout)
        try:
            self._fleet.update_weights(
                named_tensors, specs=specs, version=version, update_id=update_id, timeout=timeout, **options
            )
        except FleetUpdateFailed as failed:
            raise failed.errors.get(self._target, failed) from failed
        return _verdict(self._outcome_of(update_id))

    def give_up(self, named_tensors: NamedTensors, specs: Sequence[TensorSpec] | None) -> None:
        """Go through the gathers without sending; nobody is told, for the sidecar knows of no update yet."""
        take_part(lambda: self._fleet.take_part(named_tensors, specs=specs))

    def release(self) -> None:
        """Give the staging memory back."""
        self._fleet.release()

    def close(self) -> None:
        """Have the engine leave the group."""
        self._fleet.close()

    def _follow(
        self, named_tensors: NamedTensors, specs: Sequence[TensorSpec] | None, update_id: str, timeout: float
    ) -> UpdateResult:
        give_up = time.monotonic() + timeout
        of_before = self._outcome(update_id)  # of an attempt under this id that has ended
        self._fleet.take_part(named_tensors, specs=specs)
        if of_before is not None and of_before.state == pb.UPDATE_STATE_COMMITTED:  # its id is never used again
            return _verdict(of_before)
        while time.monotonic() < give_up:
            outcome = self._outcome(update_id)
            if outcome is not None and outcome != of_before and outcome.state in _ENDED:
                return _verdict(outcome)
            time.sleep(POLL_S)
        raise RanksMissing(f"rank 0 has not brought update {update_id!r} to its end within {timeout:.0f} s")

    def _outcome(self, update_id: str) -> pb.UpdateOutcome | None:
        with suppress(WeightSyncError):  # a sidecar that is restarted, or knows nothing of it yet
            return self._outcome_of(update_id)
        return None


_ENDED = (pb.UPDATE_STATE_COMMITTED, pb.UPDATE_STATE_ABORTED, pb.UPDATE_STATE_FAILED)


def _verdict(outcome: pb.UpdateOutcome) -> UpdateResult:
    if outcome.state == pb.UPDATE_STATE_COMMITTED:
        return wire.result(outcome)
    kind: type[WeightSyncError] = UpdateFailed if outcome.state == pb.UPDATE_STATE_FAILED else UpdateAborted
    raise kind(outcome.error, reason=outcome.error_reason)
