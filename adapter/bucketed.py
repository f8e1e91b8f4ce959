"""An update too large for one bucket, from one rank: begin, push bucket by bucket, commit; abort when it breaks.

Invariant: at most ``depth`` buckets are out at a time, two as a rule: the next is filled while the engine loads the
last, and only after the one before was let go.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from adapter.errors import WeightSyncError, from_rpc_error
from adapter.exports import Export
from adapter.filled import FilledBuckets
from adapter.known_manifest import KnownManifests
from adapter.ledger import ExportLedger
from adapter.progress import Progress
from adapter.sidecar_stub import SidecarStub
from sidecar.v1 import weight_sync_pb2 as pb

ABORT_TIMEOUT_S = 10.0


Buckets: TypeAlias = FilledBuckets[Export]
"""Staging buffers, or memory that holds the bytes already."""


@dataclass(frozen=True, slots=True)
class _Push:
    bucket: int
    export: Export
    answer: grpc.Future[pb.PushBucketResponse]


def take_part(forgo: Callable[[], None]) -> None:
    """Go through the gathers that are left, for the ranks that wait in them, without hiding why nothing is sent."""
    with suppress(RuntimeError):  # of torch.distributed: a peer has gone, too
        forgo()


def in_words(error: BaseException) -> str:
    """What the other ranks are told of it."""
    return f"{type(error).__name__}: {error}"[:512]


class BucketedSend:
    """One rank's part of one update."""

    def __init__(
        self,
        stub: SidecarStub,
        ledger: ExportLedger,
        known: KnownManifests,
        header: pb.UpdateHeader,
        buckets: Buckets,
        timeout_s: float,
    ) -> None:
        self._stub = stub
        self._ledger = ledger
        self._known = known
        self._header = header
        self._buckets = buckets
        self._give_up = time.monotonic() + timeout_s
        self._in_flight: deque[_Push] = deque()
        sizes = [bucket.num_bytes for bucket in buckets.plan.buckets]
        self._progress = Progress(f"weights {header.weight_version}", header.rank, sizes)

    def run(self) -> pb.UpdateOutcome:
        """Send everything; the committed outcome. Raises ``WeightSyncError`` or ``ValueError``."""
        plan = self._buckets.plan
        begin = pb.BeginUpdateRequest(update=self._header, manifest=self._known.reference(plan))
        method = self._stub.rpc.BeginUpdate
        self._stub.across_restarts(
            lambda left_s: self._known.call(self._stub, method, begin, plan, left_s), self._left()
        )
        commit = pb.CommitUpdateRequest(update_id=self._header.update_id, rank=self._header.rank)
        with self._held(), self._progress:
            try:
                self._push_all()
                self._buckets.expect_end()
                self._buckets.check_sources()
                self._progress.phase("committing")
                return self._stub.call(self._stub.rpc.CommitUpdate, commit, self._left()).outcome
            except BaseException as error:
                self._abort(error)
                raise

    @contextmanager
    def _held(self) -> Iterator[None]:
        """A call that stays open, so that the sidecar notices the death of this process at once."""
        if not self._stub.has(pb.FEATURE_HOLD_UPDATE):
            yield
            return
        request = pb.HoldUpdateRequest(update_id=self._header.update_id, rank=self._header.rank)
        held = self._stub.rpc.HoldUpdate.future(request, timeout=self._left())
        try:
            yield
        finally:
            held.cancel()

    def _push_all(self) -> None:
        for bucket in range(len(self._buckets.plan.buckets)):
            if len(self._in_flight) == self._buckets.depth:
                self._finish(self._in_flight.popleft())
            self._progress.phase("filling")
            self._push(bucket, self._buckets.fill(bucket))
        while self._in_flight:
            self._finish(self._in_flight.popleft())

    def _push(self, bucket: int, export: Export) -> None:
        request = pb.PushBucketRequest(
            update_id=self._header.update_id, rank=self._header.rank, bucket=bucket, handle=export.handle()
        )
        self._ledger.hold(export, self._header.update_id, bucket)
        answer = self._stub.rpc.PushBucket.future(request, timeout=self._left())
        self._in_flight.append(_Push(bucket, export, answer))

    def _finish(self, push: _Push) -> None:
        """Wait until the engine has loaded a bucket and let its memory go."""
        # Asked for instead of raised: a future that raises itself keeps this frame, and so itself, until a garbage
        # collection comes round.
        self._progress.phase("waiting for the engine")
        failure = push.answer.exception()
        if failure is not None:
            raise self._failed(push, failure) from failure
        self._progress.loaded()
        self._ledger.settle_one(push.export)

    def _failed(self, push: _Push, failure: Exception) -> WeightSyncError:
        assert isinstance(failure, grpc.RpcError)
        error = from_rpc_error(failure, self._stub.target)
        self._ledger.failed(push.export, push.bucket, error)
        return error

    def _abort(self, cause: BaseException) -> None:
        """Tell the other ranks, and learn of the pushes in flight what became of their memory."""
        request = pb.AbortUpdateRequest(
            update_id=self._header.update_id, rank=self._header.rank, reason=in_words(cause)
        )
        with suppress(WeightSyncError):  # it has ended already, or nobody is there: the cause says why
            self._stub.call(self._stub.rpc.AbortUpdate, request, ABORT_TIMEOUT_S)
        while self._in_flight:
            self._learn_fate(self._in_flight.popleft())

    def _learn_fate(self, push: _Push) -> None:
        try:
            failure = push.answer.exception(timeout=ABORT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            push.answer.cancel()
        else:
            if failure is not None:
                self._failed(push, failure)

    def _left(self) -> float:
        return max(0.001, self._give_up - time.monotonic())
