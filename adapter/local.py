"""One engine that shares memory with its trainer: a rank's updates by handles of memory that the engine opens.

Runs in every rank of the trainer; ``adapter.remote`` is its counterpart for an engine that shares none. Invariants:
memory that was handed over is dropped only when the engine has let it go or provably never saw it; and what stops this
rank alone leaves the others waiting neither at the sidecar nor in a gather.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from adapter import wire
from adapter.bucketed import Buckets
from adapter.checks import refuse_forked_cuda
from adapter.errors import EngineUnreachable, UpdateRefused, WeightSyncError
from adapter.exports import Export
from adapter.ledger import ExportLedger
from adapter.lora_client import LoraSender
from adapter.outgoing import MemoryNeed, Outgoing, Planner, WholeTensors
from adapter.planner import Plan, TensorSpec
from adapter.resident import Residents
from adapter.sending import UpdateSender
from adapter.sidecar_stub import SidecarStub
from adapter.sources.lazy import NamedTensors
from adapter.staging import StagingBuffers
from adapter.wire import UpdateResult
from sidecar.v1 import weight_sync_pb2 as pb

logger = logging.getLogger(__name__)

MEMORY_IS_KEPT = "MEMORY_IS_KEPT"


class LocalUpdates:
    """One rank's."""

    def __init__(
        self,
        stub: SidecarStub,
        rank: int,
        *,
        bucket_bytes: int,
        staging_buffers: int,
        device: torch.device | None,
        rules: Sequence[re.Pattern[str]],
        allow_expandable_segments: bool,
    ) -> None:
        self._stub = stub
        self._rank = rank
        self._device = device
        self._buffers = StagingBuffers(staging_buffers)
        self._planner = Planner(bucket_bytes, rules)
        self._residents = Residents(allow_expandable_segments, rules)
        self._ledger = ExportLedger(keeps=self._keeps)
        self._sender = UpdateSender(stub, self._ledger)
        self._stated: MemoryNeed | None = None
        self._engine_seen: pb.EngineInfo | None = None
        self._all_went_well = False
        """Whether the last update did."""

    @property
    def unreleased_bytes(self) -> int:
        """Memory that an engine may still be reading."""
        return self._ledger.unreleased_bytes

    def update(
        self,
        header: pb.UpdateHeader,
        named_tensors: NamedTensors,
        specs: Sequence[TensorSpec] | None,
        *,
        in_place: bool,
        check_finite: bool,
        timeout: float,
    ) -> UpdateResult:
        """Send one version; returns when the engine serves it. Raises ``WeightSyncError`` or ``ValueError``."""
        listed = self._resident if in_place else self._staged
        buckets = listed(header, named_tensors, specs, check_finite, timeout)
        try:
            return self._send(header, buckets, timeout)
        except UpdateRefused as refusal:
            if refusal.reason == MEMORY_IS_KEPT:  # by an engine that is not replayed any more
                self.release()
            if refusal.reason != MEMORY_IS_KEPT or not in_place:
                raise
        return self._send(header, buckets, timeout)

    def give_up(
        self,
        header: pb.UpdateHeader,
        named_tensors: NamedTensors,
        specs: Sequence[TensorSpec] | None,
        cause: Exception,
    ) -> None:
        """Tell the other ranks, and go through the gathers without sending."""
        cargo = self._planner.outgoing(named_tensors, specs)
        self._sender.give_up(header, cargo.plan, cause, lambda: cargo.forgo(self._likely_device()))

    def load_lora_adapter(
        self, request: pb.LoadLoraAdapterRequest, named_tensors: NamedTensors, timeout: float
    ) -> tuple[str, ...]:
        """Send the adapter that ``request`` describes; the names that the engine has afterwards."""
        device = self._staging_device(self.engine(timeout))
        return LoraSender(self._stub, self._ledger).load(request, named_tensors, device, timeout)

    def memory_needed(self, named_tensors: NamedTensors, specs: Sequence[TensorSpec] | None) -> MemoryNeed:
        """What an update of these takes, at most; nothing is gathered or allocated."""
        cargo = self._planner.outgoing(named_tensors, specs)
        return cargo.memory(self._buffers, self._likely_device())

    def engine(self, restarts_s: float) -> pb.EngineInfo:
        """The engine, once what an earlier update has left out is taken back; raises ``WeightSyncError``.

        ``restarts_s``: the most that is waited for a sidecar which is being restarted. After an update that went well
        and left nothing out it is not asked for: sending tells what has changed.
        """
        went_well, self._all_went_well = self._all_went_well, False
        nothing_left = not self._ledger.unreleased_bytes
        if went_well and nothing_left and self._engine_seen is not None:
            return self._engine_seen
        status = self._stub.across_restarts(lambda _: self._stub.status(), restarts_s)
        if not status.HasField("engine"):
            raise EngineUnreachable(f"the sidecar at {self._stub.target} waits for its engine: {status.reason}")
        self._revisit(status)
        self._engine_seen = status.engine
        return status.engine

    def release(self) -> None:
        """Give the staging buffers back, and have the engine close what it keeps mapped."""
        self._buffers.release()
        self._residents.let_go()

    def close(self) -> None:
        """Give everything back, and wait a moment for what the engine still holds."""
        self._look_after()
        self._ledger.settle()
        self._buffers.release()
        self._residents.clear()

    # One update.

    def _staged(
        self,
        header: pb.UpdateHeader,
        named_tensors: NamedTensors,
        specs: Sequence[TensorSpec] | None,
        look_at_values: bool,
        timeout: float,
    ) -> Buckets:
        cargo = self._planner.outgoing(named_tensors, specs)
        with self._others_are_told(header, cargo.plan, lambda: cargo.forgo(self._likely_device())):
            device = self._staging_device(self._look_before(header, cargo.plan, timeout))
            self._state_memory(cargo, device)
            if look_at_values:
                cargo.check_values()
            return cargo.staged(self._buffers, device)

    def _resident(
        self,
        header: pb.UpdateHeader,
        named_tensors: NamedTensors,
        specs: Sequence[TensorSpec] | None,
        look_at_values: bool,
        timeout: float,
    ) -> Buckets:
        if specs is not None:
            raise ValueError("in_place sends tensors from where they lie, so it takes them as a list, without specs")
        buckets = self._residents.buckets(named_tensors)
        with self._others_are_told(header, buckets.plan, buckets.forgo):
            self._look_before(header, buckets.plan, timeout)
            if look_at_values:
                buckets.check_values()
        return buckets

    @contextmanager
    def _others_are_told(self, header: pb.UpdateHeader, plan: Plan, forgo: Callable[[], None]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._sender.give_up(header, plan, error, forgo)
            raise

    def _send(self, header: pb.UpdateHeader, buckets: Buckets, timeout: float) -> UpdateResult:
        try:
            result = wire.result(self._sender.send(header, buckets, timeout))
            self._look_after()
            self._all_went_well = True
            return result
        finally:
            self._ledger.settle()

    def _look_before(self, header: pb.UpdateHeader, plan: Plan, timeout: float) -> pb.EngineInfo:
        """See that sidecar and engine are there, and know what is asked of them, before memory is spent."""
        one_call = len(plan.buckets) == 1
        self._stub.require(pb.FEATURE_ONE_CALL_UPDATE if one_call else pb.FEATURE_BUCKETED_UPDATE)
        if header.keep_cache:
            self._stub.require(pb.FEATURE_KEEP_CACHE)
        return self.engine(timeout)

    # Memory.

    def _state_memory(self, cargo: Outgoing | WholeTensors, device: torch.device) -> None:
        """Say what the update takes before it takes it, once for each amount."""
        need = cargo.memory(self._buffers, device)
        if need != self._stated:
            self._stated = need
            logger.info(
                "updates take at most %d bytes of rank %d on %s: staging buffers of %s bytes, and %d bytes to gather",
                need.total,
                self._rank,
                device,
                " and ".join(map(str, need.buffers)),
                need.gather,
            )

    def _keeps(self, export: Export) -> bool:
        return self._buffers.keeps(export) or self._residents.keeps(export)

    def _revisit(self, status: pb.GetStatusResponse) -> None:
        """Take back memory that is out of use."""
        dirty = not status.weight_version
        self._ledger.revisit(self._outcome_of, status.engine.epoch, rank=self._rank, dirty=dirty)

    def _look_after(self) -> None:
        """Take back what earlier updates, or one that failed, have left out; nothing hangs on it."""
        if self._ledger.unreleased_bytes:
            with suppress(WeightSyncError):
                status = self._stub.status()
                if status.HasField("engine"):
                    self._revisit(status)

    def _outcome_of(self, update_id: str) -> pb.UpdateOutcome | None:
        try:
            return self._stub.find_update(update_id).outcome
        except UpdateRefused:  # a sidecar that was restarted knows nothing of it
            return None

    def _staging_device(self, engine: pb.EngineInfo) -> torch.device:
        device = self._device or torch.device(engine.device)
        if device != torch.device("cuda"):  # which names no GPU
            return device
        refuse_forked_cuda()
        return torch.device("cuda", torch.cuda.current_device())

    def _likely_device(self) -> torch.device:
        """Where the other ranks stage, as far as it can be known without the engine."""
        return self._device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
