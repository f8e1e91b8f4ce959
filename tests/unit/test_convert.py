"""Messages to domain types: nothing that this protocol does not know gets through unnamed."""

from dataclasses import replace

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message

from sidecar import __version__, convert
from sidecar.engine.info import parse
from sidecar.errors import InvalidRequest, Reason, UpdateConflict
from sidecar.header import Header, PauseMode
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.memory import CudaIpcMemory, SharedMemory
from sidecar.update import LoadPath, Phase, Transport, Update, UpdateState
from sidecar.v1 import weight_sync_pb2 as pb

MANIFEST = Manifest((BucketSpec(64, (TensorSpec("w", "bfloat16", (2, 3), 16, 12),)),))


def from_the_future(message: Message, number: int = 1234) -> Message:
    """The message with one field more, as a newer adapter's serialiser would write it."""
    message.MergeFromString(bytes([number << 3 & 0x7F | 0x80, number >> 4, 7]))
    return message


def full_request() -> pb.UpdateWeightsRequest:
    tensor = pb.TensorSpec(name="w", dtype=pb.DATA_TYPE_BFLOAT16, shape=[2, 3], byte_offset=16, size_bytes=12)
    manifest = pb.Manifest(buckets=[pb.BucketSpec(size_bytes=64, tensors=[tensor, tensor])])
    handles = [pb.MemoryHandle(shared_memory=pb.SharedMemoryHandle(name="/a")), pb.MemoryHandle()]
    return pb.UpdateWeightsRequest(
        update=pb.UpdateHeader(update_id="u"), manifest=pb.ManifestReference(manifest=manifest), handles=handles
    )


def test_a_request_of_known_fields_passes() -> None:
    convert.refuse_unknown_fields(full_request())


def test_an_unknown_field_is_refused_by_number_and_message_wherever_it_is() -> None:
    places = {
        "UpdateWeightsRequest": full_request(),
        "UpdateHeader": full_request(),
        "Manifest": full_request(),
        "TensorSpec": full_request(),
        "MemoryHandle": full_request(),
        "SharedMemoryHandle": full_request(),
    }
    from_the_future(places["UpdateWeightsRequest"])
    from_the_future(places["UpdateHeader"].update)
    from_the_future(places["Manifest"].manifest.manifest)
    from_the_future(places["TensorSpec"].manifest.manifest.buckets[0].tensors[1])
    from_the_future(places["MemoryHandle"].handles[1])
    from_the_future(places["SharedMemoryHandle"].handles[0].shared_memory)
    for name, request in places.items():
        with pytest.raises(InvalidRequest) as raised:
            convert.refuse_unknown_fields(request)
        assert raised.value.reason is Reason.UNKNOWN_FIELD
        assert raised.value.message.startswith(f"field 1234 of {name} is unknown to this sidecar ({__version__})")
        assert raised.value.details == {"field": "1234", "of": name, "sidecarVersion": __version__}


def test_a_dtype_from_the_future_stays_a_number_that_the_manifests_check_refuses() -> None:
    message = pb.Manifest(buckets=[pb.BucketSpec(size_bytes=4, tensors=[pb.TensorSpec(name="w")])])
    message.buckets[0].tensors[0].MergeFromString(b"\x10\x63")  # dtype = 99
    assert convert.manifest(message).buckets[0].tensors[0].dtype == "number 99"


def test_a_dtype_that_is_not_set_is_not_a_dtype() -> None:
    assert convert.dtype_name(pb.DATA_TYPE_UNSPECIFIED) == "unspecified"


def test_the_header_is_taken_over_with_retract_as_the_default() -> None:
    message = pb.UpdateHeader(update_id="u", weight_version="v", rank=1, tp_size=2)
    expected = Header(update_id="u", weight_version="v", rank=1, tp_size=2, pause_mode=PauseMode.RETRACT)
    assert convert.header(message) == expected


def test_a_cache_that_is_to_be_kept_is() -> None:
    assert convert.header(pb.UpdateHeader(keep_cache=True)).keep_cache
    assert not convert.header(pb.UpdateHeader()).keep_cache


def test_every_pause_mode_of_the_protocol_is_known() -> None:
    for name, value in pb.PauseMode.items()[1:]:
        mode = convert.header(pb.UpdateHeader(pause_mode=value)).pause_mode
        assert mode.value == name.removeprefix("PAUSE_MODE_").lower()


def test_a_pause_mode_from_the_future_is_refused_by_number() -> None:
    message = pb.UpdateHeader(rank=1)
    message.MergeFromString(b"\x28\x63")  # pause_mode = 99
    with pytest.raises(InvalidRequest, match="rank 1: pause mode 99 is unknown to this sidecar") as raised:
        convert.header(message)
    assert raised.value.reason is Reason.INVALID_HEADER


def test_the_manifest_is_taken_over() -> None:
    tensor = pb.TensorSpec(name="w", dtype=pb.DATA_TYPE_BFLOAT16, shape=[2, 3], byte_offset=16, size_bytes=12)
    message = pb.Manifest(buckets=[pb.BucketSpec(size_bytes=64, tensors=[tensor])])
    assert convert.manifest(message) == MANIFEST


def test_handles_are_taken_over_field_by_field() -> None:
    shared = pb.SharedMemoryHandle(manager_path="/tmp/m", name="/a", size_bytes=7)
    assert convert.memory(pb.MemoryHandle(shared_memory=shared), 0, 0) == SharedMemory("/tmp/m", "/a", 7)
    cuda = pb.CudaIpcHandle(
        device_uuid="GPU-ABC",
        memory_handle=b"handle",
        storage_size_bytes=1,
        storage_offset_bytes=2,
        ref_counter_handle="/counter",
        ref_counter_offset=3,
        event_handle=b"event",
        event_sync_required=True,
    )
    assert convert.memory(pb.MemoryHandle(cuda_ipc=cuda), 0, 0) == CudaIpcMemory(
        device_uuid="abc",
        memory_handle=b"handle",
        size_bytes=1,
        storage_offset_bytes=2,
        ref_counter_handle="/counter",
        ref_counter_offset=3,
        event_handle=b"event",
        event_sync_required=True,
    )


def test_a_handle_of_no_kind_is_refused_with_rank_and_bucket() -> None:
    with pytest.raises(InvalidRequest, match="rank 1, bucket 2: the memory handle is of no kind") as raised:
        convert.memory(pb.MemoryHandle(), 1, 2)
    assert raised.value.reason is Reason.INVALID_HANDLE


def test_an_outcome_says_everything_there_is_to_say() -> None:
    header = Header(update_id="u", weight_version="v", rank=0, tp_size=2)
    update = Update(header=header, manifest=MANIFEST, digest="d", phase_seconds={Phase.COLLECT: 0.25})
    assert list(convert.outcome(update).waiting_for_ranks) == [0, 1]
    update.end(UpdateState.ABORTED, UpdateConflict(Reason.RANKS_DIFFER, "they differ"))
    message = convert.outcome(update)
    assert (message.update_id, message.weight_version, message.manifest_digest) == ("u", "v", "d")
    assert (message.state, message.num_buckets, message.num_posted) == (pb.UPDATE_STATE_ABORTED, 1, 0)
    assert (message.error, message.error_reason) == ("they differ", "RANKS_DIFFER")
    assert message.phases[0].phase == pb.PHASE_COLLECT
    assert message.phases[0].duration.ToMilliseconds() == 250
    assert list(message.waiting_for_ranks) == []


def test_an_outcome_leaves_no_field_of_the_protocol_out() -> None:
    """Drift: whoever adds a field to UpdateOutcome or EngineInfo meets this list."""
    fields = descriptor_pb2.DescriptorProto()
    pb.UpdateOutcome.DESCRIPTOR.CopyToProto(fields)
    assert [field.name for field in fields.field] == [
        "update_id", "weight_version", "state", "manifest_digest", "num_buckets", "num_posted", "waiting_for_ranks",
        "cache_flushed", "phases", "error", "error_reason", "engine_epoch", "num_posted_ever",
        "verification", "notes", "load_path", "load_reason", "transport",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("enum", "domain"), [(pb.UpdateState, UpdateState), (pb.Phase, Phase), (pb.Transport, Transport)]
)
def test_the_domains_numbers_are_the_protocols(enum: type, domain: type) -> None:
    names = {member.name: member.value for member in domain}  # type: ignore[attr-defined]
    described = enum.DESCRIPTOR.values[1:]  # type: ignore[attr-defined]
    assert names == {value.name.partition("_")[2].removeprefix("STATE_"): value.number for value in described}


def test_the_ways_of_loading_have_the_protocols_numbers() -> None:
    names = {value.name.removeprefix("LOAD_PATH_"): value.number for value in pb.LoadPath.DESCRIPTOR.values[1:]}
    assert names == {path.name: path.value for path in LoadPath if path}


def test_the_engine_is_described_as_it_was_seen() -> None:
    message = convert.engine_info(parse({"version": "0.5.23", "tp_size": 2, "device": "cpu", "pp_size": 2}), epoch=3)
    assert (message.version, message.tp_size, message.device, message.epoch) == ("0.5.23", 2, "cpu", 3)
    assert (message.dialect, message.uses_sessions) == ("0.5.21", True)
    assert list(message.gpu_uuids) == []
    assert message.unsupported_reason.startswith("pipeline parallelism")


def test_the_engines_gpus_are_told_as_nvidia_smi_shows_them() -> None:
    info = replace(parse({"version": "0.5.23", "tp_size": 2, "device": "cuda"}), gpu_uuids=("abc", ""))
    assert list(convert.engine_info(info, epoch=1).gpu_uuids) == ["GPU-abc", ""]


def test_a_group_is_taken_over_and_told_field_by_field() -> None:
    message = pb.WeightsUpdateGroup(
        group_name="g", master_address="trainer", master_port=29500, rank_offset=3, world_size=5, backend="nccl"
    )
    group = convert.group(message)
    assert (group.name, group.master_address, group.master_port) == ("g", "trainer", 29500)
    assert (group.rank_offset, group.world_size, group.backend) == (3, 5, "nccl")
    assert convert.group_info(group) == message


def test_a_header_over_a_group_in_two_phases_is_taken_over() -> None:
    header = convert.header(pb.UpdateHeader(group_name="g", two_phase=True))
    assert (header.group_name, header.two_phase) == ("g", True)
    assert (convert.header(pb.UpdateHeader()).group_name, convert.header(pb.UpdateHeader()).two_phase) == ("", False)


def test_an_outcome_tells_how_the_bytes_come() -> None:
    header = Header(update_id="u", weight_version="v", rank=0, tp_size=1, group_name="g")
    assert convert.outcome(Update(header, MANIFEST, "d")).transport == pb.TRANSPORT_DISTRIBUTED
    assert convert.outcome(Update(replace(header, group_name=""), MANIFEST, "d")).transport == pb.TRANSPORT_IPC
