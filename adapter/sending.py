"""One rank's part of one update, from its buckets to the sidecar's verdict: in one call, or bucket by bucket.

Invariant: whatever goes wrong on this rank, the others are told of it, and none is left waiting for this one, neither
at the sidecar nor in a gather of the trainer's own process group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from adapter.bucketed import ABORT_TIMEOUT_S, BucketedSend, Buckets, in_words, take_part
from adapter.errors import WeightSyncError
from adapter.exports import Export
from adapter.known_manifest import KnownManifests
from adapter.ledger import ExportLedger
from adapter.planner import Plan
from adapter.sidecar_stub import SidecarStub
from sidecar.v1 import weight_sync_pb2 as pb


class UpdateSender:
    """Sends one rank's updates, one after the other."""

    def __init__(self, stub: SidecarStub, ledger: ExportLedger) -> None:
        self._stub = stub
        self._ledger = ledger
        self._known = KnownManifests()

    def send(self, header: pb.UpdateHeader, buckets: Buckets, timeout_s: float) -> pb.UpdateOutcome:
        """Send everything; the committed outcome. Raises ``WeightSyncError`` or ``ValueError``."""
        with self._others_do_not_wait(buckets):
            if len(buckets.plan.buckets) == 1:
                outcome = self._in_one_call(header, buckets, timeout_s)
            else:
                outcome = BucketedSend(self._stub, self._ledger, self._known, header, buckets, timeout_s).run()
            self._known.remember(buckets.plan, outcome.manifest_digest)
        return outcome

    def give_up(self, header: pb.UpdateHeader, plan: Plan, cause: BaseException, forgo: Callable[[], None]) -> None:
        """Tell the other ranks, at the sidecar and in their gathers, that this one will not send.

        ``forgo`` takes part in the gathers. Raises nothing: the cause is what the caller must learn.
        """
        if not isinstance(cause, Exception):  # Ctrl-C
            return
        self._tell(header, plan, cause)
        take_part(forgo)

    @contextmanager
    def _others_do_not_wait(self, buckets: Buckets) -> Iterator[None]:
        try:
            yield
        except Exception:
            take_part(buckets.forgo)
            raise

    def _tell(self, header: pb.UpdateHeader, plan: Plan, cause: BaseException) -> None:
        with suppress(WeightSyncError, ValueError):  # nobody is there, it has ended already, or it cannot be told
            self._join_and_abort(header, plan, in_words(cause))

    def _in_one_call(self, header: pb.UpdateHeader, buckets: Buckets, timeout_s: float) -> pb.UpdateOutcome:
        reference = self._known.reference(buckets.plan)
        export, handle = self._filled(header, buckets)
        request = pb.UpdateWeightsRequest(update=header, manifest=reference, handles=[handle])
        method = self._stub.rpc.UpdateWeights
        self._ledger.hold(export, header.update_id, 0)
        try:
            outcome = self._stub.across_restarts(
                lambda left_s: self._known.call(self._stub, method, request, buckets.plan, left_s), timeout_s
            ).outcome
        except WeightSyncError as error:
            self._ledger.failed(export, 0, error)
            raise
        self._ledger.settle_one(export)
        buckets.check_sources()
        return outcome

    def _filled(self, header: pb.UpdateHeader, buckets: Buckets) -> tuple[Export, pb.MemoryHandle]:
        try:
            export = buckets.fill(0)
            buckets.expect_end()
            return export, export.handle()
        except BaseException as error:
            self._tell(header, buckets.plan, error)
            raise

    def _join_and_abort(self, header: pb.UpdateHeader, plan: Plan, reason: str) -> None:
        if header.tp_size == 1:
            return
        begin = pb.BeginUpdateRequest(update=header, manifest=self._known.reference(plan))
        self._known.call(self._stub, self._stub.rpc.BeginUpdate, begin, plan, ABORT_TIMEOUT_S)
        abort = pb.AbortUpdateRequest(update_id=header.update_id, rank=header.rank, reason=reason)
        self._stub.call(self._stub.rpc.AbortUpdate, abort, ABORT_TIMEOUT_S)
