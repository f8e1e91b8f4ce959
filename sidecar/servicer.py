"""gRPC in, coordinator, gRPC out. Thin: no decision is taken here; errors are mapped by the interceptor."""

from typing import Protocol

import grpc

from sidecar import __version__, convert
from sidecar.config import Limits, Timeouts
from sidecar.coordinator import Coordinator
from sidecar.errors import InvalidRequest, NotKnown, Reason
from sidecar.lora_loader import LoraLoader
from sidecar.manifest_store import KnownManifest, ManifestStore
from sidecar.update import Update
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["WeightSyncService"].full_name

# Answer this share of the caller's deadline early (and at most so many seconds), so that the answer arrives.
EARLY_SHARE, EARLY_MAX_S = 0.1, 1.0

FEATURES = [value for value in pb.Feature.values() if value != pb.FEATURE_UNSPECIFIED]
DTYPES = [value for value in pb.DataType.values() if value != pb.DATA_TYPE_UNSPECIFIED]

Context = grpc.aio.ServicerContext[object, object]


class Watch(Protocol):
    """Who looks at the engine."""

    async def first_look(self, seconds: float) -> None:
        """Until that has been done; no longer than ``seconds``, and than a moment."""


class WeightSyncServicer(pb_grpc.WeightSyncServiceServicer):
    """``sidecar.v1.WeightSyncService``; see the proto for each call."""

    def __init__(
        self,
        coordinator: Coordinator,
        watch: Watch,
        loader: LoraLoader,
        manifests: ManifestStore,
        timeouts: Timeouts,
        limits: Limits,
    ) -> None:
        self._coordinator = coordinator
        self._watch = watch
        self._lora = loader
        self._manifests = manifests
        self._longest_s = timeouts.total
        self._limits = limits

    async def GetCapabilities(self, request: pb.GetCapabilitiesRequest, context: Context) -> pb.GetCapabilitiesResponse:
        await self._watch.first_look(self._budget(context) / 2)
        engine = self._coordinator.engine
        return pb.GetCapabilitiesResponse(
            sidecar_version=__version__,
            features=FEATURES,
            dtypes=DTYPES,
            engine=convert.engine_info(engine, self._coordinator.epoch) if engine else None,
        )

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        convert.refuse_unknown_fields(request)
        await self._watch.first_look(self._budget(context) / 2)
        now = self._coordinator
        return pb.GetStatusResponse(
            state=pb.SidecarState.ValueType(now.standing.state),
            reason=now.standing.reason,
            weight_version=now.standing.weight_version,
            current_update=convert.outcome(now.current) if now.current else None,
            last_update=convert.outcome(now.last) if now.last else None,
            engine=convert.engine_info(now.engine, now.epoch) if now.engine else None,
            group=convert.group_info(now.group) if now.group else None,
        )

    async def UpdateWeights(self, request: pb.UpdateWeightsRequest, context: Context) -> pb.UpdateWeightsResponse:
        convert.refuse_unknown_fields(request)
        header = convert.header(request.update)
        handles = {i: convert.memory(handle, header.rank, i) for i, handle in enumerate(request.handles)}
        known = await self._manifest(request.manifest, header.rank)
        update = await self._coordinator.update_weights(header, known, handles, self._budget(context))
        return pb.UpdateWeightsResponse(outcome=convert.outcome(update))

    async def BeginUpdate(self, request: pb.BeginUpdateRequest, context: Context) -> pb.BeginUpdateResponse:
        convert.refuse_unknown_fields(request)
        header = convert.header(request.update)
        known = await self._manifest(request.manifest, header.rank)
        await self._coordinator.begin(header, known)
        return pb.BeginUpdateResponse(manifest_digest=known.digest)

    async def HoldUpdate(self, request: pb.HoldUpdateRequest, context: Context) -> pb.HoldUpdateResponse:
        convert.refuse_unknown_fields(request)
        update = await self._coordinator.hold(request.update_id, request.rank, self._budget(context))
        return pb.HoldUpdateResponse(outcome=convert.outcome(update))

    async def PushBucket(self, request: pb.PushBucketRequest, context: Context) -> pb.PushBucketResponse:
        convert.refuse_unknown_fields(request)
        memory = convert.memory(request.handle, request.rank, request.bucket)
        budget = self._budget(context)
        await self._coordinator.push(request.update_id, request.rank, request.bucket, memory, budget)
        return pb.PushBucketResponse()

    async def PrepareUpdate(self, request: pb.PrepareUpdateRequest, context: Context) -> pb.PrepareUpdateResponse:
        convert.refuse_unknown_fields(request)
        await self._coordinator.prepare(request.update_id, request.rank, self._budget(context))
        return pb.PrepareUpdateResponse()

    async def CommitUpdate(self, request: pb.CommitUpdateRequest, context: Context) -> pb.CommitUpdateResponse:
        convert.refuse_unknown_fields(request)
        update = await self._coordinator.commit(request.update_id, request.rank, self._budget(context))
        return pb.CommitUpdateResponse(outcome=convert.outcome(update))

    async def PublishUpdate(self, request: pb.PublishUpdateRequest, context: Context) -> pb.PublishUpdateResponse:
        convert.refuse_unknown_fields(request)
        update = await self._coordinator.publish(request.update_id, request.rank, self._budget(context))
        return pb.PublishUpdateResponse(outcome=convert.outcome(update))

    async def AbortUpdate(self, request: pb.AbortUpdateRequest, context: Context) -> pb.AbortUpdateResponse:
        convert.refuse_unknown_fields(request)
        update = await self._coordinator.abort(
            request.update_id, request.rank, request.reason, even_if_not_begun=request.even_if_not_begun
        )
        return pb.AbortUpdateResponse(outcome=convert.outcome(update))

    async def UpdateWeightsFromDisk(
        self, request: pb.UpdateWeightsFromDiskRequest, context: Context
    ) -> pb.UpdateWeightsFromDiskResponse:
        convert.refuse_unknown_fields(request)
        header = convert.disk_header(request)
        update = await self._coordinator.update_from_disk(header, request.model_path, self._budget(context))
        return pb.UpdateWeightsFromDiskResponse(outcome=convert.outcome(update))

    async def CheckManifest(self, request: pb.CheckManifestRequest, context: Context) -> pb.CheckManifestResponse:
        convert.refuse_unknown_fields(request)
        known = await self._manifest(request.manifest, rank=0)
        report = await self._coordinator.check(known, convert.allowance(request.allow))
        return convert.check_response(known.digest, report)

    async def InitWeightsUpdateGroup(
        self, request: pb.InitWeightsUpdateGroupRequest, context: Context
    ) -> pb.InitWeightsUpdateGroupResponse:
        convert.refuse_unknown_fields(request)
        await self._coordinator.join_group(convert.group(request.group))
        return pb.InitWeightsUpdateGroupResponse()

    async def DestroyWeightsUpdateGroup(
        self, request: pb.DestroyWeightsUpdateGroupRequest, context: Context
    ) -> pb.DestroyWeightsUpdateGroupResponse:
        convert.refuse_unknown_fields(request)
        return pb.DestroyWeightsUpdateGroupResponse(was_joined=await self._coordinator.leave_group(request.group_name))

    async def FenceEngine(self, request: pb.FenceEngineRequest, context: Context) -> pb.FenceEngineResponse:
        convert.refuse_unknown_fields(request)
        await self._coordinator.fence(request.reason, pause=request.pause)
        return pb.FenceEngineResponse()

    async def GetUpdate(self, request: pb.GetUpdateRequest, context: Context) -> pb.GetUpdateResponse:
        convert.refuse_unknown_fields(request)
        return convert.update_response(self._find(request.update_id))

    async def LoadLoraAdapter(self, request: pb.LoadLoraAdapterRequest, context: Context) -> pb.LoadLoraAdapterResponse:
        convert.refuse_unknown_fields(request)
        header = convert.lora_header(request)
        if request.give_up:
            load = await self._lora.give_up(header, request.give_up)
        else:
            spec, memory = convert.adapter(request), convert.memory(request.handle, request.rank, 0)
            known = await self._manifest(request.manifest, request.rank)
            load = await self._lora.load(header, spec, known, memory, self._budget(context))
        return pb.LoadLoraAdapterResponse(outcome=convert.outcome(load), loaded_adapters=await self._lora.loaded())

    async def UnloadLoraAdapter(
        self, request: pb.UnloadLoraAdapterRequest, context: Context
    ) -> pb.UnloadLoraAdapterResponse:
        convert.refuse_unknown_fields(request)
        was_loaded = await self._lora.unload(request.lora_name, self._budget(context))
        return pb.UnloadLoraAdapterResponse(was_loaded=was_loaded)

    def _find(self, update_id: str) -> Update:
        try:
            return self._coordinator.find(update_id)
        except NotKnown:
            return self._lora.find(update_id)

    async def _manifest(self, reference: pb.ManifestReference, rank: int) -> KnownManifest:
        match reference.WhichOneof("reference"):
            case "manifest":
                convert.check_size(reference.manifest, self._limits, rank)
                sent = reference.manifest.SerializeToString(deterministic=True)
                return await self._manifests.read(sent, lambda: convert.manifest(reference.manifest), rank)
            case "digest":
                return self._manifests.get(reference.digest)
            case _:
                message = f"rank {rank}: the update has no manifest; send it, or the digest of one sent before"
                raise InvalidRequest(Reason.EMPTY_UPDATE, message, rank=rank)

    def _budget(self, context: Context) -> float:
        """Seconds that this call may wait: a little less than its caller does."""
        remaining: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say
        if remaining is None:
            return self._longest_s
        return max(0.0, remaining - min(EARLY_MAX_S, EARLY_SHARE * remaining))
