"""Protocol messages <-> the domain's types, and nothing else.

Invariant: what comes out is typed but not yet checked; what this protocol version does not know is refused here by
name instead of being dropped, so that a newer adapter is told what an older sidecar cannot do.
"""

import time
from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from sidecar import __version__, lora
from sidecar.config import Limits
from sidecar.engine.info import EngineInfo
from sidecar.errors import InvalidRequest, LimitExceeded, Reason
from sidecar.group import Group
from sidecar.header import Header, PauseMode, Selector
from sidecar.lora import AdapterSpec
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.manifest_check import Allowance, Report, is_pattern
from sidecar.memory import CudaIpcMemory, Memory, SharedMemory, bare_uuid, shared_memory_id
from sidecar.update import Update
from sidecar.v1 import weight_sync_pb2 as pb

MAX_PATH, MAX_FILE_NAME = 4096, 255
"""Linux's own limits."""
MAX_PATTERNS = 1000
"""Each is tried on every name; of names that are spelt out there may be any number."""

_PAUSE_MODES = {
    pb.PAUSE_MODE_UNSPECIFIED: PauseMode.RETRACT,
    pb.PAUSE_MODE_RETRACT: PauseMode.RETRACT,
    pb.PAUSE_MODE_IN_PLACE: PauseMode.IN_PLACE,
    pb.PAUSE_MODE_ABORT: PauseMode.ABORT,
    pb.PAUSE_MODE_DRAIN: PauseMode.DRAIN,
    pb.PAUSE_MODE_NONE: PauseMode.NONE,
}
_SELECTORS = {
    pb.SELECTOR_UNSPECIFIED: None,
    pb.SELECTOR_TARGET: Selector.TARGET,
    pb.SELECTOR_DRAFT: Selector.DRAFT,
    pb.SELECTOR_ALL: Selector.ALL,
}
_DTYPE_NAMES = {value: name.removeprefix("DATA_TYPE_").lower() for name, value in pb.DataType.items()}


def refuse_unknown_fields(request: Message) -> None:
    """Raise ``InvalidRequest`` if the request holds a field that this sidecar's protocol does not have.

    Such fields are gone from ``request`` afterwards: copying it first would cost as much as reading a large manifest.
    """
    sent = request.SerializeToString()
    request.DiscardUnknownFields()
    if request.ByteSize() == len(sent):
        return
    where, number = next(_unknown_fields(type(request).FromString(sent)))
    message = f"field {number} of {where} is unknown to this sidecar ({__version__}): the adapter is newer; upgrade "
    message += "the sidecar, or ask only for the features that GetCapabilities lists"
    raise InvalidRequest(Reason.UNKNOWN_FIELD, message, field=number, of=where, sidecarVersion=__version__)


def _unknown_fields(message: Message) -> Iterator[tuple[str, int]]:
    for field in UnknownFieldSet(message):  # type: ignore[attr-defined]
        yield message.DESCRIPTOR.name, field.field_number
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for child in value if descriptor.is_repeated else (value,):
                yield from _unknown_fields(child)


def header(message: pb.UpdateHeader) -> Header:
    """The header, with the default pause mode filled in."""
    if message.selector not in _SELECTORS:
        raise _unknown(f"rank {message.rank}: selector", message.selector, "selector")
    return Header(
        update_id=message.update_id,
        weight_version=message.weight_version,
        rank=message.rank,
        tp_size=message.tp_size,
        pause_mode=pause_mode(message.pause_mode, f"rank {message.rank}"),
        selector=_SELECTORS[message.selector],
        verify=message.verify,
        content_digest=message.content_digest,
        allow=allowance(message.allow),
        keep_cache=message.keep_cache,
        group_name=message.group_name,
        two_phase=message.two_phase,
    )


def disk_header(message: pb.UpdateWeightsFromDiskRequest) -> Header:
    """A disk update's, which has one caller whatever the engine's tp_size; its path is one that a folder can have."""
    path = message.model_path
    if (
        len(path.encode()) > MAX_PATH
        or not path.isprintable()
        or any(len(name.encode()) > MAX_FILE_NAME for name in path.split("/"))
    ):
        problem = f"model_path {path[:128]!r} cannot be a folder's: at most {MAX_PATH} printable bytes, and "
        problem += f"{MAX_FILE_NAME} from one slash to the next"
        raise InvalidRequest(Reason.INVALID_HEADER, problem, field="model_path")
    return Header(
        update_id=message.update_id,
        weight_version=message.weight_version,
        rank=0,
        tp_size=1,
        pause_mode=pause_mode(message.pause_mode, "the caller"),
    )


def lora_header(message: pb.LoadLoraAdapterRequest) -> Header:
    """A LoRA load's, whose version is the adapter's name."""
    lora.check_name(message.lora_name, f"rank {message.rank}")
    return Header(
        update_id=message.update_id, weight_version=message.lora_name, rank=message.rank, tp_size=message.tp_size
    )


def adapter(message: pb.LoadLoraAdapterRequest) -> AdapterSpec:
    """The adapter without its tensors."""
    return lora.parse(
        message.config_json,
        name=message.lora_name,
        pinned=message.pinned,
        replace=message.replace,
        rank=message.rank,
    )


def pause_mode(value: pb.PauseMode.ValueType, who: str) -> PauseMode:
    """One pause mode; unset is the default."""
    if value not in _PAUSE_MODES:
        raise _unknown(f"{who}: pause mode", value, "pause_mode")
    return _PAUSE_MODES[value]


def _unknown(what: str, value: int, field: str) -> InvalidRequest:
    problem = f"{what} {value} is unknown to this sidecar ({__version__})"
    return InvalidRequest(Reason.INVALID_HEADER, problem, field=field)


def allowance(message: pb.ManifestAllowance) -> Allowance:
    """Exceptions to the names' checks, in an order of their own so that ranks compare equal."""
    for name, allowed in (("unknown", message.unknown), ("missing", message.missing)):
        number = sum(map(is_pattern, allowed))
        if number > MAX_PATTERNS:
            problem = f"allow.{name} has {number} patterns; at most {MAX_PATTERNS} are possible: choose wider ones"
            raise InvalidRequest(Reason.INVALID_HEADER, problem, field="allow")
    return Allowance(tuple(sorted(message.unknown)), tuple(sorted(message.missing)))


def check_size(message: pb.Manifest, limits: Limits, rank: int) -> None:
    """No more than this sidecar accepts; raises ``LimitExceeded``."""
    tensors = sum(len(bucket.tensors) for bucket in message.buckets)
    for number, limit, what in (
        (len(message.buckets), limits.buckets, "buckets"),
        (tensors, limits.tensors, "tensors"),
    ):
        if number > limit:
            problem = f"rank {rank}: the manifest has {number} {what}, and this sidecar takes {limit} (--max-{what})"
            raise LimitExceeded(Reason.TOO_LARGE, problem, rank=rank, sent=number, limit=limit)


def manifest(message: pb.Manifest) -> Manifest:
    """The manifest as sent."""
    return Manifest(tuple(_bucket(bucket) for bucket in message.buckets))


def _bucket(message: pb.BucketSpec) -> BucketSpec:
    return BucketSpec(message.size_bytes, tuple(_tensor(tensor) for tensor in message.tensors))


def _tensor(message: pb.TensorSpec) -> TensorSpec:
    return TensorSpec(
        message.name, dtype_name(message.dtype), tuple(message.shape), message.byte_offset, message.size_bytes
    )


def dtype_name(value: pb.DataType.ValueType) -> str:
    """Torch's name of an element type; a number that this protocol does not have stays a number."""
    return _DTYPE_NAMES.get(value) or f"number {value}"


def memory(message: pb.MemoryHandle, rank: int, bucket: int) -> Memory:
    """One handle; raises ``InvalidRequest`` if it is of no kind that this protocol has."""
    match message.WhichOneof("kind"):
        case "cuda_ipc":
            return _cuda_ipc(message.cuda_ipc, message.loan)
        case "shared_memory":
            shared = message.shared_memory
            return SharedMemory(shared.manager_path, shared.name, shared.size_bytes, message.loan)
        case _:
            problem = (
                f"rank {rank}, bucket {bucket}: the memory handle is of no kind that this sidecar ({__version__}) "
            )
            problem += "knows; it knows cuda_ipc and shared_memory"
            raise InvalidRequest(Reason.INVALID_HANDLE, problem, rank=rank, bucket=bucket)


def _cuda_ipc(message: pb.CudaIpcHandle, loan: int) -> CudaIpcMemory:
    return CudaIpcMemory(
        device_uuid=bare_uuid(message.device_uuid),
        memory_handle=message.memory_handle,
        size_bytes=message.storage_size_bytes,
        storage_offset_bytes=message.storage_offset_bytes,
        ref_counter_handle=message.ref_counter_handle,
        ref_counter_offset=message.ref_counter_offset,
        event_handle=message.event_handle,
        event_sync_required=message.event_sync_required,
        loan=loan,
        lease=message.lease,
        kept=message.kept,
        ready_event=message.ready_event,
    )


def outcome(update: Update) -> pb.UpdateOutcome:
    """Everything there is to say about one update."""
    message = pb.UpdateOutcome(
        update_id=update.id,
        weight_version=update.header.weight_version,
        state=pb.UpdateState.ValueType(update.state),
        manifest_digest=update.digest,
        num_buckets=update.num_buckets,
        num_posted=update.num_posted,
        waiting_for_ranks=update.missing(),
        cache_flushed=update.cache_flushed,
        error=update.error.message if update.error else "",
        error_reason=update.error.reason if update.error else "",
        engine_epoch=update.epoch,
        num_posted_ever=max(update.num_posted, update.num_posted_before),
        verification=pb.Verification.ValueType(update.verification),
        notes=update.notes,
        load_path=pb.LoadPath.ValueType(update.load_path),
        load_reason=update.load_reason,
        transport=pb.Transport.ValueType(update.transport),
    )
    for phase, seconds in update.spent(time.monotonic()).items():
        message.phases.add(phase=pb.Phase.ValueType(phase)).duration.FromNanoseconds(round(seconds * 1e9))
    return message


def update_response(update: Update) -> pb.GetUpdateResponse:
    """For who asks how it went."""
    message = pb.GetUpdateResponse(outcome=outcome(update))
    if update.state.ended:
        message.ended_ago.FromNanoseconds(round((time.monotonic() - update.ended_at) * 1e9))
    return message


def check_response(digest: str, report: Report) -> pb.CheckManifestResponse:
    """What a dry run found."""
    findings = [
        pb.ManifestFinding(
            severity=pb.Severity.ValueType(finding.severity),
            kind=finding.kind,
            tensors=finding.tensors,
            message=finding.message,
        )
        for finding in report.findings
    ]
    return pb.CheckManifestResponse(
        manifest_digest=digest, findings=findings, sources=report.sources, unchecked=report.unchecked
    )


def engine_info(info: EngineInfo, epoch: int) -> pb.EngineInfo:
    """The engine, for capabilities and status."""
    return pb.EngineInfo(
        version=info.version,
        tp_size=info.tp_size,
        device=info.device,
        dialect=info.dialect.name,
        uses_sessions=info.dialect.uses_sessions,
        unsupported_reason=info.unsupported,
        epoch=epoch,
        replays=info.replays,
        gpu_uuids=[uuid and f"GPU-{uuid}" for uuid in info.gpu_uuids],
        shared_memory_id=shared_memory_id(),
        num_nodes=info.nnodes,
    )


def group(message: pb.WeightsUpdateGroup) -> Group:
    """A group as the trainer describes it."""
    return Group(
        name=message.group_name,
        master_address=message.master_address,
        master_port=message.master_port,
        rank_offset=message.rank_offset,
        world_size=message.world_size,
        backend=message.backend,
    )


def group_info(group: Group) -> pb.WeightsUpdateGroup:
    """The group that the engine is in."""
    return pb.WeightsUpdateGroup(
        group_name=group.name,
        master_address=group.master_address,
        master_port=group.master_port,
        rank_offset=group.rank_offset,
        world_size=group.world_size,
        backend=group.backend,
    )
