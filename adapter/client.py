"""What a trainer's rank uses: ``WeightSyncClient(target, rank=r, tp_size=n).update_weights(named_tensors, version=v)``.

Runs in every TP rank of the trainer, in its own process, with torch and gRPC alone: no SGLang, no process group, no
pickle. All ranks call with the same names, dtypes, shapes and version, in any order; rank r sends full tensors from
the memory that the engine's TP rank r can open (the same GPU, or the same host).

Invariant: memory that was handed over is dropped only when the engine has let it go or provably never saw it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

import torch

from adapter import wire
from adapter.bucketed import Buckets
from adapter.checks import refuse_forked_cuda
from adapter.credentials import NO_CREDENTIALS, Credentials
from adapter.errors import EngineUnreachable, UpdateRefused, WeightSyncError
from adapter.exports import Export
from adapter.fusion import DEFAULT_RULES, compile_rules
from adapter.ledger import ExportLedger
from adapter.locality import shares_memory
from adapter.lora_client import LoraConfig, LoraSender, config_json
from adapter.outgoing import MemoryNeed, Outgoing, Planner, WholeTensors
from adapter.planner import Plan, TensorSpec, plan
from adapter.remote import RemoteUpdates
from adapter.resident import Residents
from adapter.sending import UpdateSender
from adapter.sidecar_stub import RESTART_PATIENCE_S, SidecarStub
from adapter.sources.lazy import NamedTensors
from adapter.staging import DEFAULT_BUFFERS, StagingBuffers
from adapter.wire import UpdateResult
from sidecar.v1 import weight_sync_pb2 as pb

logger = logging.getLogger(__name__)

DEFAULT_BUCKET_BYTES = 2 << 30
GIVE_UP_S = 5.0
MEMORY_IS_KEPT = "MEMORY_IS_KEPT"
TRANSPORTS = AUTO, IPC, DISTRIBUTED = "auto", "ipc", "distributed"


class WeightSyncClient:
    """One trainer rank's connection to the sidecar of one engine. Not for use by several threads at once.

    Whole tensors that come again as they were (names, dtypes, shapes, strides; in place also addresses) are planned and
    listed once. What is remembered for that is names and numbers, never a tensor: besides the staging buffers only
    memory that was sent in place is kept, until the next update in place or ``close``.

    Args:
        target: where the sidecar listens: ``unix:/path.sock`` or ``host:port``.
        rank: this process's TP rank, 0 .. tp_size - 1.
        tp_size: the engine's tensor-parallel size, and the number of ranks that call.
        bucket_bytes: the most memory that one bucket takes. A model that fits goes in one call and one POST; a
            larger one goes bucket by bucket. A single tensor above it gets a bucket of its own.
        staging_buffers: how many buckets of memory this rank keeps for staging: with two, one is filled while the
            engine loads the other.
        device: where buckets are staged; by default the current CUDA device for an engine on GPUs, else the host.
        fused_groups: further tensors that must travel together, as regular expressions (``adapter.fusion``).
        allow_expandable_segments: with ``in_place``, whether memory of expandable segments may be exported: only
            where the engine was seen to open it.
        credentials: for a sidecar with TLS or tokens.
        restart_patience: seconds that an update waits for a sidecar that was there before and is being restarted.
        transport: "ipc", where rank r's memory can be opened by the engine's TP rank r; "distributed", where it cannot:
            rank 0 broadcasts over torch.distributed, the others gather along, and ``rank`` and ``tp_size`` are the
            trainer's own; "auto": found out at the first update (``adapter.locality``).
    """

    def __init__(
        self,
        target: str,
        *,
        rank: int,
        tp_size: int,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        staging_buffers: int = DEFAULT_BUFFERS,
        device: torch.device | str | None = None,
        fused_groups: Sequence[str] = (),
        allow_expandable_segments: bool = False,
        credentials: Credentials = NO_CREDENTIALS,
        restart_patience: float = RESTART_PATIENCE_S,
        transport: str = AUTO,
    ) -> None:
        if not 0 <= rank < tp_size:
            raise ValueError(f"rank {rank} is outside 0..{tp_size - 1}")
        if transport not in TRANSPORTS:
            raise ValueError(f"transport {transport!r} is none of {', '.join(TRANSPORTS)}")
        self.rank = rank
        self.tp_size = tp_size
        self.bucket_bytes = bucket_bytes
        self._device = torch.device(device) if device is not None else None
        self._rules = (*DEFAULT_RULES, *compile_rules(fused_groups))
        self._stub = SidecarStub(target, credentials, restart_patience)
        self._update_timeout = 0.0
        """Of the update in hand."""
        self._buffers = StagingBuffers(staging_buffers)
        self._planner = Planner(bucket_bytes, self._rules)
        self._residents = Residents(allow_expandable_segments, self._rules)
        self._ledger = ExportLedger(keeps=self._keeps)
        self._sender = UpdateSender(self._stub, self._ledger)
        self._stated: MemoryNeed | None = None
        self._engine_seen: pb.EngineInfo | None = None
        self._all_went_well = False
        """Whether the last update did."""
        self._transport = transport
        self._remote = RemoteUpdates(
            target,
            rank,
            self._ask,
            self._give_up,
            credentials=credentials,
            bucket_bytes=bucket_bytes,
            staging_buffers=staging_buffers,
            device=self._device,
            fused_groups=fused_groups,
        )

    def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        version: str,
        update_id: str | None = None,
        specs: Sequence[TensorSpec] | None = None,
        in_place: bool = False,
        check_finite: bool = False,
        pause_mode: str = "retract",
        flush_cache: bool = True,
        selector: str | None = None,
        verify: bool = False,
        content_digest: str = "",
        allow_unknown: Sequence[str] = (),
        allow_missing: Sequence[str] = (),
        timeout: float = 600.0,
    ) -> UpdateResult:
        """Send one weight version, with every other rank; returns when the engine serves it.

        Args:
            named_tensors: (Hugging Face name, tensor) pairs, the same names, dtypes and shapes on every rank: whole
                tensors, DTensors, or what ``adapter.sources`` makes of a trainer's shards. What must be gathered is
                gathered bucket by bucket, on every rank of its process group, even if the update fails.
            version: what the engine reports as weight_version afterwards; new for every update.
            update_id: names this update on every rank; by default the version.
            specs: what ``named_tensors`` will yield, in order, for an iterator too large to be held: then one bucket
                at a time is taken from it. Without it the pairs are listed first.
            in_place: export the memory that the tensors lie in, without a copy. Each storage is one bucket; the same
                layout on every rank. The tensors must not change before the call returns. Where nothing is exported
                (``transport``) they are copied all the same.
            check_finite: refuse NaN and infinity before anything is sent; each rank looks at what it holds. Of several
                ranks whose engine shares no memory with them (``transport``) only rank 0 could say so: refused.
            pause_mode: what happens to running requests: "retract", "in_place", "abort", "drain" (they are waited
                for first) or "none" (one bucket before SGLang 0.5.21, or an idle engine).
            flush_cache: empty the prefix cache, so that no answer rests on KV of the old weights.
            selector: which of the engine's models, for one that decodes speculatively: "target", "draft" or "all".
            verify: compare the engine's checksums over its ranks, and with the last verified ones for the same
                ``content_digest``, before the version is published; a difference is an ``UpdateFailed``.
            content_digest: names the content for ``verify``, in any way of yours; empty: there is nothing to compare.
            allow_unknown: names (or patterns with * and ?) that the model does not have: the engine skips them.
            allow_missing: names (or patterns) of the model that keep their old weights.
            timeout: seconds for the whole update. If ranks are missing by then, the error names them and the engine
                goes on with its old weights.

        Raises:
            WeightSyncError: see ``adapter.errors`` for what each kind says about the engine.
            ValueError: a tensor, name, dtype or option that cannot be sent; nothing was.
        """
        self._update_timeout = timeout
        if self.transport == DISTRIBUTED:
            if check_finite and self.tp_size > 1:
                raise ValueError(
                    "check_finite: over torch.distributed the sidecar hears rank 0 alone; look at the tensors first"
                )
            return self._remote.update(
                named_tensors,
                specs,
                version=version,
                update_id=update_id or version,
                timeout=timeout,
                check_finite=check_finite,
                pause_mode=pause_mode,
                flush_cache=flush_cache,
                selector=selector,
                verify=verify,
                content_digest=content_digest,
                allow_unknown=allow_unknown,
                allow_missing=allow_missing,
            )
        header = pb.UpdateHeader(
            update_id=update_id or version,
            weight_version=version,
            rank=self.rank,
            tp_size=self.tp_size,
            pause_mode=wire.pause_mode(pause_mode),
            selector=wire.selector(selector),
            verify=verify,
            content_digest=content_digest,
            keep_cache=not flush_cache,
            allow=pb.ManifestAllowance(unknown=allow_unknown, missing=allow_missing),
        )
        if in_place:
            buckets = self._resident(header, named_tensors, specs, check_finite)
        else:
            buckets = self._staged(header, named_tensors, specs, check_finite)
        try:
            return self._send(header, buckets, timeout)
        except UpdateRefused as refusal:
            if refusal.reason == MEMORY_IS_KEPT:  # by an engine that is not replayed any more
                self.release_staging()
            if refusal.reason != MEMORY_IS_KEPT or not in_place:
                raise
        return self._send(header, buckets, timeout)

    def give_up(
        self,
        named_tensors: NamedTensors,
        *,
        version: str,
        cause: Exception,
        update_id: str | None = None,
        specs: Sequence[TensorSpec] | None = None,
    ) -> None:
        """In place of ``update_weights``, on a rank that cannot: the other ranks are told of ``cause`` at once.

        Takes part in all gathers of ``named_tensors`` that they go through. Raises only ``ValueError`` for tensors
        that could not have been sent.
        """
        if self.transport == DISTRIBUTED:
            self._remote.give_up(named_tensors, specs, update_id or version, cause)
            return
        cargo = self._planner.outgoing(named_tensors, specs)
        header = pb.UpdateHeader(
            update_id=update_id or version,
            weight_version=version,
            rank=self.rank,
            tp_size=self.tp_size,
            pause_mode=wire.pause_mode("retract"),
        )
        self._sender.give_up(header, cargo.plan, cause, lambda: cargo.forgo(self._likely_device()))

    def memory_needed(self, named_tensors: NamedTensors, *, specs: Sequence[TensorSpec] | None = None) -> MemoryNeed:
        """What an update of these tensors takes of this rank's memory, at most; nothing is gathered or allocated."""
        cargo = self._planner.outgoing(named_tensors, specs)
        return cargo.memory(self._buffers, self._likely_device())

    def release_staging(self) -> None:
        """Give the staging buffers back until the next update, and have the engine close what it keeps mapped.

        An engine with the replay loader keeps the memory of updates mapped, so that freeing it frees nothing before.
        Waits at most five seconds for each region.
        """
        self._buffers.release()
        self._residents.let_go()
        self._remote.release()

    def update_weights_from_disk(
        self, *, version: str, model_path: str = "", pause_mode: str = "retract", timeout: float = 1800.0
    ) -> UpdateResult:
        """Have the engine load a checkpoint from its own disk, as ``version``; one rank calls, the others need not.

        Heals a dirty engine without the trainer's weights. ``model_path``: a folder that the engine can read; empty:
        the one that it was started with. Raises ``WeightSyncError``.
        """
        self._stub.require(pb.FEATURE_DISK_UPDATE)
        request = pb.UpdateWeightsFromDiskRequest(
            update_id=f"disk {version}",
            weight_version=version,
            model_path=model_path,
            pause_mode=wire.pause_mode(pause_mode),
        )
        return wire.result(self._stub.call(self._stub.rpc.UpdateWeightsFromDisk, request, timeout).outcome)

    def load_lora_adapter(
        self,
        name: str,
        named_tensors: NamedTensors,
        config: LoraConfig,
        *,
        pinned: bool = False,
        replace: bool = True,
        timeout: float = 600.0,
    ) -> tuple[str, ...]:
        """Send a LoRA adapter alone, with every other rank; returns the engine's adapters once requests can name it.

        For an engine with --enable-lora. Nothing is paused, and the weight version stays.

        Args:
            name: what requests call it (``lora_path``).
            named_tensors: the adapter's tensors, whole, named as in adapter_model.safetensors
                (``adapter.sources.lora_adapter(model)``).
            config: adapter_config.json as a dict, or peft's own (``model.peft_config["default"]``).
            pinned: whether it stays in the engine's pool.
            replace: take out an adapter of that name first, once the requests that use it have ended; until the new
                one is there, requests that name it are refused. Without a gap: choose a new name each time.
            timeout: seconds for all of it. The memory is at most one copy of the adapter.

        Raises:
            WeightSyncError: the model's own weights and version stand, whatever it is.
            ValueError: a tensor or config that cannot be sent; nothing was.
        """
        self._stub.require(pb.FEATURE_LORA_ADAPTER)
        request = pb.LoadLoraAdapterRequest(
            update_id=f"lora {name}"[:128],
            rank=self.rank,
            tp_size=self.tp_size,
            lora_name=name,
            config_json=config_json(config),
            pinned=pinned,
            replace=replace,
        )
        self._update_timeout = timeout
        device = self._staging_device(self._engine())
        return LoraSender(self._stub, self._ledger).load(request, named_tensors, device, timeout)

    def unload_lora_adapter(self, name: str, *, timeout: float = 120.0) -> bool:
        """Take a LoRA adapter out, once the requests that use it have ended; whether it was there. One rank calls."""
        self._stub.require(pb.FEATURE_LORA_ADAPTER)
        request = pb.UnloadLoraAdapterRequest(lora_name=name)
        return self._stub.call(self._stub.rpc.UnloadLoraAdapter, request, timeout).was_loaded

    def check_manifest(
        self, specs: Sequence[TensorSpec], *, allow_unknown: Sequence[str] = (), allow_missing: Sequence[str] = ()
    ) -> pb.CheckManifestResponse:
        """A dry run: what would be wrong with an update of ``specs``, cut into buckets as ``update_weights`` does.

        Nothing is loaded, paused or allocated. The answer also says what could not be checked, and why.
        """
        self._stub.require(pb.FEATURE_CHECK_MANIFEST)
        manifest = wire.manifest(plan(specs, self.bucket_bytes, self._rules))
        request = pb.CheckManifestRequest(
            manifest=pb.ManifestReference(manifest=manifest),
            allow=pb.ManifestAllowance(unknown=allow_unknown, missing=allow_missing),
        )
        return self._stub.call(self._stub.rpc.CheckManifest, request, 60.0)

    def get_update(self, update_id: str) -> pb.UpdateOutcome:
        """How an update went or goes, also one whose call did not get its answer."""
        return self._ask(update_id).outcome

    def status(self) -> pb.GetStatusResponse:
        """What the sidecar is doing, and for whom it waits."""
        return self._stub.status()

    def capabilities(self) -> pb.GetCapabilitiesResponse:
        """What the sidecar and its engine can do."""
        return self._stub.capabilities()

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Until the sidecar answers and sees its engine; raises ``WeightSyncError`` with the reason why not."""
        self._stub.wait_ready(timeout)

    @property
    def transport(self) -> str:
        """How weights come to this engine, "ipc" or "distributed"; as long as "auto" cannot be decided, "ipc"."""
        if self._transport == AUTO:
            try:
                engine = self._engine()
            except WeightSyncError:
                return IPC  # whatever is done next says why
            self._transport = IPC if shares_memory(engine, self._device) else DISTRIBUTED
            logger.info("weights come to the engine of %s by %s", self._stub.target, self._transport)
        return self._transport

    @property
    def unreleased_bytes(self) -> int:
        """Memory of this process that an engine may still be reading; 0 after every healthy update."""
        return self._ledger.unreleased_bytes

    def close(self) -> None:
        """Close the connection, give the staging buffers back, and wait a moment for what the engine still holds."""
        self._look_after()
        self._ledger.settle()
        self._buffers.release()
        self._residents.clear()
        self._remote.close()
        self._stub.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # One update.

    def _staged(
        self,
        header: pb.UpdateHeader,
        named_tensors: NamedTensors,
        specs: Sequence[TensorSpec] | None,
        look_at_values: bool,
    ) -> Buckets:
        cargo = self._planner.outgoing(named_tensors, specs)
        with self._others_are_told(header, cargo.plan, lambda: cargo.forgo(self._likely_device())):
            device = self._staging_device(self._look_before(header, cargo.plan))
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
    ) -> Buckets:
        if specs is not None:
            raise ValueError("in_place sends tensors from where they lie, so it takes them as a list, without specs")
        buckets = self._residents.buckets(named_tensors)
        with self._others_are_told(header, buckets.plan, buckets.forgo):
            self._look_before(header, buckets.plan)
            if look_at_values:
                buckets.check_values()
        return buckets

    @contextmanager
    def _others_are_told(self, header: pb.UpdateHeader, plan: Plan, forgo: Callable[[], None]) -> Iterator[None]:
        """What stops this rank alone must not leave the others waiting, neither at the sidecar nor in a gather."""
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

    def _require(self, header: pb.UpdateHeader, plan: Plan) -> None:
        one_call = len(plan.buckets) == 1
        self._stub.require(pb.FEATURE_ONE_CALL_UPDATE if one_call else pb.FEATURE_BUCKETED_UPDATE)
        if header.keep_cache:
            self._stub.require(pb.FEATURE_KEEP_CACHE)

    def _state_memory(self, cargo: Outgoing | WholeTensors, device: torch.device) -> None:
        """Say what the update takes before it takes it, once for each amount."""
        need = cargo.memory(self._buffers, device)
        if need != self._stated:
            self._stated = need
            logger.info(
                "updates take at most %d bytes of rank %d on %s: staging buffers of %s bytes, and %d bytes to gather",
                need.total,
                self.rank,
                device,
                " and ".join(map(str, need.buffers)),
                need.gather,
            )

    def _keeps(self, export: Export) -> bool:
        return self._buffers.keeps(export) or self._residents.keeps(export)

    def _look_before(self, header: pb.UpdateHeader, plan: Plan) -> pb.EngineInfo:
        """See that sidecar and engine are there before memory is spent, and take back what is out of use."""
        self._require(header, plan)
        return self._engine()

    def _engine(self) -> pb.EngineInfo:
        """The engine, once what an earlier update has left out is taken back.

        After an update that went well and left nothing out it is not asked for: sending tells what has changed.
        """
        went_well, self._all_went_well = self._all_went_well, False
        nothing_left = not self._ledger.unreleased_bytes
        if went_well and nothing_left and self._engine_seen is not None:
            return self._engine_seen
        status = self._stub.across_restarts(lambda _: self._stub.status(), self._update_timeout)
        if not status.HasField("engine"):
            raise EngineUnreachable(f"the sidecar at {self._stub.target} waits for its engine: {status.reason}")
        self._revisit(status)
        self._engine_seen = status.engine
        return status.engine

    def _revisit(self, status: pb.GetStatusResponse) -> None:
        """Take back memory that is out of use."""
        dirty = not status.weight_version
        self._ledger.revisit(self._outcome_of, status.engine.epoch, rank=self.rank, dirty=dirty)

    def _look_after(self) -> None:
        """Take back what earlier updates, or one that failed, have left out; nothing hangs on it."""
        if self._ledger.unreleased_bytes:
            with suppress(WeightSyncError):
                status = self._stub.status()
                if status.HasField("engine"):
                    self._revisit(status)

    def _ask(self, update_id: str) -> pb.GetUpdateResponse:
        return self._stub.call(self._stub.rpc.GetUpdate, pb.GetUpdateRequest(update_id=update_id), 10.0)

    def _give_up(self, update_id: str, why: str) -> None:
        """Whether it has begun or not."""
        request = pb.AbortUpdateRequest(update_id=update_id, rank=self.rank, reason=why, even_if_not_begun=True)
        self._stub.call(self._stub.rpc.AbortUpdate, request, GIVE_UP_S)

    def _outcome_of(self, update_id: str) -> pb.UpdateOutcome | None:
        try:
            return self.get_update(update_id)
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
