"""What a trainer's rank uses: ``WeightSyncClient(target, rank=r, tp_size=n).update_weights(named_tensors, version=v)``.

Runs in every TP rank of the trainer, in its own process, with torch and gRPC alone: no SGLang, no process group, no
pickle. All ranks call with the same names, dtypes, shapes and version, in any order; rank r sends full tensors from
the memory that the engine's TP rank r can open (the same GPU, or the same host).

Invariant: which way the bytes go (``adapter.local``, ``adapter.remote``) changes neither when an update counts as
done nor what its errors say about the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from adapter import wire
from adapter.credentials import NO_CREDENTIALS, Credentials
from adapter.errors import WeightSyncError
from adapter.fusion import DEFAULT_RULES, compile_rules
from adapter.local import LocalUpdates
from adapter.locality import shares_memory
from adapter.lora_client import LoraConfig, config_json
from adapter.outgoing import MemoryNeed
from adapter.planner import TensorSpec, plan
from adapter.remote import RemoteUpdates
from adapter.sidecar_stub import RESTART_PATIENCE_S, SidecarStub
from adapter.sources.lazy import NamedTensors
from adapter.staging import DEFAULT_BUFFERS
from adapter.wire import UpdateResult
from sidecar.v1 import weight_sync_pb2 as pb

logger = logging.getLogger(__name__)

DEFAULT_BUCKET_BYTES = 2 << 30
ABORT_S = 5.0
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
        self._local = LocalUpdates(
            self._stub,
            rank,
            bucket_bytes=bucket_bytes,
            staging_buffers=staging_buffers,
            device=self._device,
            rules=self._rules,
            allow_expandable_segments=allow_expandable_segments,
        )
        self._transport = transport
        self._remote = RemoteUpdates(
            target,
            rank,
            self._stub.find_update,
            self._abort,
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
        if self._transport_within(timeout) == DISTRIBUTED:
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
        return self._local.update(
            header, named_tensors, specs, in_place=in_place, check_finite=check_finite, timeout=timeout
        )

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
        if self._transport_within(ABORT_S) == DISTRIBUTED:
            self._remote.give_up(named_tensors, specs, update_id or version, cause)
            return
        header = pb.UpdateHeader(
            update_id=update_id or version,
            weight_version=version,
            rank=self.rank,
            tp_size=self.tp_size,
            pause_mode=wire.pause_mode("retract"),
        )
        self._local.give_up(header, named_tensors, specs, cause)

    def memory_needed(self, named_tensors: NamedTensors, *, specs: Sequence[TensorSpec] | None = None) -> MemoryNeed:
        """What an update of these tensors takes of this rank's memory, at most; nothing is gathered or allocated."""
        return self._local.memory_needed(named_tensors, specs)

    def release_staging(self) -> None:
        """Give the staging buffers back until the next update, and have the engine close what it keeps mapped.

        An engine with the replay loader keeps the memory of updates mapped, so that freeing it frees nothing before.
        Waits at most five seconds for each region.
        """
        self._local.release()
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
        return self._local.load_lora_adapter(request, named_tensors, timeout)

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
        return self._stub.find_update(update_id).outcome

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
        return self._transport_within(0.0)

    @property
    def unreleased_bytes(self) -> int:
        """Memory of this process that an engine may still be reading; 0 after every healthy update."""
        return self._local.unreleased_bytes

    def close(self) -> None:
        """Close the connection, give the staging buffers back, and wait a moment for what the engine still holds."""
        self._local.close()
        self._remote.close()
        self._stub.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _transport_within(self, restarts_s: float) -> str:
        if self._transport == AUTO:
            try:
                engine = self._local.engine(restarts_s)
            except WeightSyncError:
                return IPC  # whatever is done next says why
            self._transport = IPC if shares_memory(engine, self._device) else DISTRIBUTED
            logger.info("weights come to the engine of %s by %s", self._stub.target, self._transport)
        return self._transport

    def _abort(self, update_id: str, why: str) -> None:
        """Whether it has begun or not."""
        request = pb.AbortUpdateRequest(update_id=update_id, rank=self.rank, reason=why, even_if_not_begun=True)
        self._stub.call(self._stub.rpc.AbortUpdate, request, ABORT_S)
