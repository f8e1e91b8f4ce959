"""One engine that shares no memory with its trainer: the same call, over torch.distributed.

Runs in every rank of the trainer. Rank 0 is a fleet of one; the others gather along, since the weights may be sharded
over all of them, and learn from the sidecar how it went. Invariant: what is raised is the sidecar's own verdict, or the
word of the rank that gave up, which the sidecar notes for the others; only where it cannot be reached do they wait for
their own time to pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from adapter import wire
from adapter.bucketed import in_words, take_part
from adapter.credentials import Credentials
from adapter.errors import RanksMissing, WeightSyncError
from adapter.fleet import Fleet, FleetUpdateFailed
from adapter.planner import TensorSpec
from adapter.sources.lazy import NamedTensors
from adapter.wire import UpdateResult
from sidecar.v1 import weight_sync_pb2 as pb

POLL_S = 0.05
TRANSFER_S = 600.0
"""One engine keeps no others waiting: as long as the sidecar gives one bucket."""
RANKS_APART_S = 30.0
"""How much later than rank 0's the call of another rank may begin, and still be told how that one's ended."""
Ask = Callable[[str], pb.GetUpdateResponse]
"""How the update of that id went; raises ``WeightSyncError``."""
GiveUp = Callable[[str, str], object]
"""Has the sidecar note an update as aborted, by id, and why."""


class RemoteUpdates:
    """One rank's updates of one engine."""

    def __init__(
        self,
        target: str,
        rank: int,
        ask: Ask,
        give_up: GiveUp,
        *,
        credentials: Credentials,
        bucket_bytes: int,
        staging_buffers: int,
        device: torch.device | None,
        fused_groups: Sequence[str],
    ) -> None:
        self._target = target
        self._rank = rank
        self._ask = ask
        self._give_up = give_up
        self._told_at = -math.inf
        """When this rank's last call ended: what had ended by then, it was told of."""
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
        began = time.monotonic()
        try:
            result = self._fleet.update_weights(
                named_tensors, specs=specs, version=version, update_id=update_id, timeout=timeout, **options
            )
        except BaseException as failure:
            if self._ended(update_id, since=began) is None:  # or the sidecar tells the others itself
                self._tell(update_id, failure)
            if isinstance(failure, FleetUpdateFailed):
                raise failure.errors.get(self._target, failure) from failure
            raise
        update = result.engines[self._target].update
        assert update is not None, "all of the fleet have published it"
        return update

    def give_up(
        self, named_tensors: NamedTensors, specs: Sequence[TensorSpec] | None, update_id: str, cause: Exception
    ) -> None:
        """Tell the other ranks, and go through the gathers without sending."""
        self._tell(update_id, cause)
        self._told_at = time.monotonic()
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
        began = time.monotonic()
        since = max(self._told_at, began - RANKS_APART_S)
        try:
            self._fleet.take_part(named_tensors, specs=specs)
            while (outcome := self._ended(update_id, since)) is None and time.monotonic() < began + timeout:
                time.sleep(POLL_S)
        finally:
            self._told_at = time.monotonic()
        if outcome is None:
            raise RanksMissing(f"rank 0 has not brought update {update_id!r} to its end within {timeout:.0f} s")
        if failure := wire.failure(outcome):
            raise failure
        return wire.result(outcome)

    def _ended(self, update_id: str, since: float) -> pb.UpdateOutcome | None:
        """How it ended, after ``since``, as an id may have been tried before. None: it has not, or nobody can tell."""
        asked = time.monotonic()
        with suppress(WeightSyncError):  # a sidecar that is restarted, or knows nothing of it yet
            answer = self._ask(update_id)
            outcome, ended_at = answer.outcome, asked - answer.ended_ago.ToMicroseconds() / 1e6
            if outcome.state == pb.UPDATE_STATE_COMMITTED or (outcome.state in _ENDED and ended_at > since):
                return outcome
        return None

    def _tell(self, update_id: str, cause: BaseException) -> None:
        with suppress(WeightSyncError):  # they cannot be told
            self._give_up(update_id, in_words(cause))


_ENDED = (pb.UPDATE_STATE_ABORTED, pb.UPDATE_STATE_FAILED)
"""Without having been committed, so that its id may be tried again."""
