"""What a trainer's rank uses: ``WeightSyncClient(target, rank=r, tp_size=n).update_weights(named_tensors, version=v)``.

Runs in every TP rank of the trainer, in its own process, with torch and gRPC alone: no SGLang, no process group, no
pickle. All ranks call with the same names, dtypes, shapes and version, in any order; rank r sends full tensors from
the memory that the engine's TP rank r can open (the same GPU, or the same host).

Invariant: memory that was handed over is dropped only when the engine has let it go or provably never saw it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch

from adapter import wire
from adapter.bucketed import BucketedSend
from adapter.errors import EngineUnreachable, UpdateRefused, WeightSyncError
from adapter.ledger import ExportLedger
from adapter.planner import Plan, TensorSpec, plan
from adapter.sidecar_stub import SidecarStub
from adapter.staging import expect_end, stage
from adapter.wire import UpdateResult
from sidecar.v1 import weight_sync_pb2 as pb

DEFAULT_BUCKET_BYTES = 2 << 30
MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightSyncClient:
    """One trainer rank's connection to the sidecar of one engine. Not for use by several threads at once.

    Args:
        target: where the sidecar listens: ``unix:/path.sock`` or ``host:port``.
        rank: this process's TP rank, 0 .. tp_size - 1.
        tp_size: the engine's tensor-parallel size, and the number of ranks that call.
        bucket_bytes: the most memory that one bucket takes. A model that fits goes in one call and one POST; a
            larger one goes bucket by bucket, two in flight. A single tensor above it gets a bucket of its own.
        device: where buckets are staged; by default the current CUDA device for an engine on GPUs, else the host.
    """

    def __init__(
        self,
        target: str,
        *,
        rank: int,
        tp_size: int,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= rank < tp_size:
            raise ValueError(f"rank {rank} is outside 0..{tp_size - 1}")
        self.rank = rank
        self.tp_size = tp_size
        self.bucket_bytes = bucket_bytes
        self._device = torch.device(device) if device is not None else None
        self._stub = SidecarStub(target)
        self._ledger = ExportLedger()
        self._known: tuple[Plan, str] | None = None

    def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        version: str,
        update_id: str | None = None,
        specs: Sequence[TensorSpec] | None = None,
        pause_mode: str = "retract",
        selector: str | None = None,
        verify: bool = False,
        content_digest: str = "",
        allow_unknown: Sequence[str] = (),
        allow_missing: Sequence[str] = (),
        timeout: float = 600.0,
    ) -> UpdateResult:
        """Send one weight version, with every other rank; returns when the engine serves it.

        Args:
            named_tensors: (Hugging Face name, full tensor) pairs, the same names, dtypes and shapes on every rank.
            version: what the engine reports as weight_version afterwards; new for every update.
            update_id: names this update on every rank; by default the version.
            specs: what ``named_tensors`` will yield, in order, for an iterator too large to be held: then one bucket
                at a time is taken from it. Without it the pairs are listed first.
            pause_mode: what happens to running requests: "retract", "in_place", "abort", "drain" (they are waited
                for first) or "none" (one bucket before SGLang 0.5.21, or an idle engine).
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
            ValueError: no tensor, an unknown dtype or pause mode, or pairs that do not match ``specs``.
        """
        if specs is None:
            named_tensors = list(named_tensors)
            specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named_tensors]
        planned = plan(specs, self.bucket_bytes)
        header = pb.UpdateHeader(
            update_id=update_id or version,
            weight_version=version,
            rank=self.rank,
            tp_size=self.tp_size,
            pause_mode=wire.pause_mode(pause_mode),
            selector=wire.selector(selector),
            verify=verify,
            content_digest=content_digest,
            allow=pb.ManifestAllowance(unknown=allow_unknown, missing=allow_missing),
        )
        try:
            result = self._send(header, planned, iter(named_tensors), timeout)
            self._look_after()
            return result
        finally:
            self._ledger.settle()

    def update_weights_from_disk(
        self, *, version: str, model_path: str = "", pause_mode: str = "retract", timeout: float = 1800.0
    ) -> UpdateResult:
        """Have the engine load a checkpoint from its own disk, as ``version``; one rank calls, the others need not.

        Heals a dirty engine without the trainer's weights. ``model_path``: a folder that the engine can read; empty:
        the one that it loaded last. Raises ``WeightSyncError``.
        """
        self._stub.require(pb.FEATURE_DISK_UPDATE)
        request = pb.UpdateWeightsFromDiskRequest(
            update_id=f"disk {version}",
            weight_version=version,
            model_path=model_path,
            pause_mode=wire.pause_mode(pause_mode),
        )
        return wire.result(self._stub.call(self._stub.rpc.UpdateWeightsFromDisk, request, timeout).outcome)

    def check_manifest(
        self, specs: Sequence[TensorSpec], *, allow_unknown: Sequence[str] = (), allow_missing: Sequence[str] = ()
    ) -> pb.CheckManifestResponse:
        """A dry run: what would be wrong with an update of ``specs``, cut into buckets as ``update_weights`` does.

        Nothing is loaded, paused or allocated. The answer also says what could not be checked, and why.
        """
        self._stub.require(pb.FEATURE_CHECK_MANIFEST)
        request = pb.CheckManifestRequest(
            manifest=pb.ManifestReference(manifest=wire.manifest(plan(specs, self.bucket_bytes))),
            allow=pb.ManifestAllowance(unknown=allow_unknown, missing=allow_missing),
        )
        return self._stub.call(self._stub.rpc.CheckManifest, request, 60.0)

    def get_update(self, update_id: str) -> pb.UpdateOutcome:
        """How an update went or goes, also one whose call did not get its answer."""
        request = pb.GetUpdateRequest(update_id=update_id)
        return self._stub.call(self._stub.rpc.GetUpdate, request, 10.0).outcome

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
    def unreleased_bytes(self) -> int:
        """Memory of this process that an engine may still be reading; 0 after every healthy update."""
        return self._ledger.unreleased_bytes

    def close(self) -> None:
        """Close the connection, and wait a moment for memory that the engine still holds."""
        self._look_after()
        self._ledger.settle()
        self._stub.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # One update.

    def _send(
        self, header: pb.UpdateHeader, planned: Plan, tensors: Iterator[tuple[str, torch.Tensor]], timeout: float
    ) -> UpdateResult:
        one_call = len(planned.buckets) == 1
        self._stub.require(pb.FEATURE_ONE_CALL_UPDATE if one_call else pb.FEATURE_BUCKETED_UPDATE)
        device = self._staging_device(self._look_before())
        if one_call:
            outcome = self._in_one_call(header, planned, tensors, device, timeout)
        else:
            outcome = BucketedSend(self._stub, self._ledger, header, device, timeout).run(planned, tensors)
        self._known = (planned, outcome.manifest_digest)
        return wire.result(outcome)

    def _in_one_call(
        self,
        header: pb.UpdateHeader,
        planned: Plan,
        tensors: Iterator[tuple[str, torch.Tensor]],
        device: torch.device,
        timeout: float,
    ) -> pb.UpdateOutcome:
        export = stage(planned.buckets[0], tensors, device)
        expect_end(tensors)
        request = pb.UpdateWeightsRequest(update=header, manifest=self._reference(planned), handles=[export.handle()])
        self._ledger.hold(export, header.update_id, 0)
        try:
            outcome = self._update_weights(request, planned, timeout)
        except WeightSyncError as error:
            self._ledger.failed(export, 0, error)
            raise
        self._ledger.settle_one(export)
        return outcome

    def _update_weights(self, request: pb.UpdateWeightsRequest, planned: Plan, timeout: float) -> pb.UpdateOutcome:
        """The call, again with the manifest in full if the sidecar has forgotten its digest."""
        method = self._stub.rpc.UpdateWeights
        try:
            return self._stub.call(method, request, timeout).outcome
        except UpdateRefused as refusal:
            if refusal.reason != MANIFEST_UNKNOWN:
                raise
        request.manifest.CopyFrom(pb.ManifestReference(manifest=wire.manifest(planned)))
        return self._stub.call(method, request, timeout).outcome

    def _reference(self, planned: Plan) -> pb.ManifestReference:
        """The digest of a manifest that the sidecar told us of, or the manifest in full."""
        if self._known and self._known[0] == planned:
            return pb.ManifestReference(digest=self._known[1])
        return pb.ManifestReference(manifest=wire.manifest(planned))

    def _look_before(self) -> pb.EngineInfo:
        """See that sidecar and engine are there before memory is spent, and take back what is out of use."""
        status = self._stub.status()
        if not status.HasField("engine"):
            raise EngineUnreachable(f"the sidecar at {self._stub.target} waits for its engine: {status.reason}")
        self._revisit(status)
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

    def _outcome_of(self, update_id: str) -> pb.UpdateOutcome | None:
        try:
            return self.get_update(update_id)
        except UpdateRefused:  # a sidecar that was restarted knows nothing of it
            return None

    def _staging_device(self, engine: pb.EngineInfo) -> torch.device:
        if self._device is not None:
            return self._device
        if engine.device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
