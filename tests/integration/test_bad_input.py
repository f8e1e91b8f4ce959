"""Refusals that need more than one call, another engine, or none: the engine has not been touched by any."""

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.conftest import StartPair
from tests.integration.support import Pair, failed_call, header, refusal

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
CUDA = pb.CudaIpcHandle(
    device_uuid="GPU-6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c5d",
    memory_handle=b"\x01c" + bytes(64),
    storage_size_bytes=128,
    ref_counter_handle="/torch_1",
    event_handle=bytes(64),
    event_sync_required=True,
)


def cuda(request: pb.UpdateWeightsRequest) -> None:
    request.handles[0].CopyFrom(pb.MemoryHandle(cuda_ipc=CUDA))


def test_a_bad_request_does_not_disturb_an_update_that_is_being_collected(pair: Pair) -> None:
    waiting = pair.send(pair.request("undisturbed", rank=0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    request = pair.request("undisturbed", rank=1)
    request.manifest.manifest.buckets[0].tensors[0].dtype = pb.DATA_TYPE_UNSPECIFIED
    assert refusal(pair.send(request)).reason == "INVALID_TENSOR"
    assert pair.posts() == []
    good = pair.send(pair.request("undisturbed", rank=1))
    assert good.result().outcome.state == waiting.result().outcome.state == pb.UPDATE_STATE_COMMITTED


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        pytest.param(
            "memory_handle",
            bytes(63),
            "rank 1, bucket 0: memory_handle of 63 bytes is none of torch's",
            id="short-handle",
        ),
        pytest.param(
            "memory_handle",
            bytes(66),
            "rank 1, bucket 0: memory_handle of 66 bytes is none of torch's",
            id="handle-of-no-type",
        ),
        pytest.param(
            "event_handle",
            bytes(63),
            "rank 1, bucket 0: event_handle has 63 bytes instead of 64",
            id="short-event",
        ),
        pytest.param(
            "ref_counter_handle",
            "",
            "rank 1, bucket 0: reference counters: '' is not of the form /name",
            id="no-counter",
        ),
        pytest.param(
            "ref_counter_handle",
            "/torch_gone",
            "rank 1, bucket 0: reference counters: cannot see /torch_gone",
            id="counter-gone",
        ),
        pytest.param(
            "ref_counter_offset",
            3,
            "rank 1, bucket 0: ref_counter_offset 3 is past the end of the counters' file",
            id="counter-outside",
        ),
        pytest.param(
            "ref_counter_offset",
            2**64 - 1,
            "rank 1, bucket 0: ref_counter_offset 18446744073709551615 is past the end",
            id="counter-huge",
        ),
        pytest.param(
            "ref_counter_offset",
            2,
            "rank 1, bucket 0: the reference count of this handle is 0 instead of 1: export the memory anew",
            id="counter-released",
        ),
        pytest.param("storage_offset_bytes", 3, "rank 1, bucket 0: storage_offset_bytes 3", id="misaligned-storage"),
        pytest.param("storage_size_bytes", 2**63, "rank 1, bucket 0: storage_offset_bytes 0", id="huge-storage"),
        pytest.param(
            "storage_size_bytes",
            1,
            "rank 1, bucket 0: the memory handle spans 1 bytes, the bucket needs 128",
            id="small-storage",
        ),
        pytest.param("device_uuid", "0", "rank 1, bucket 0: device_uuid '0' is not a GPU's UUID", id="no-uuid"),
    ],
)
def test_a_bad_cuda_handle_is_refused_for_an_engine_on_gpus(
    cuda_pair: Pair, field: str, value: object, said: str
) -> None:
    request = cuda_pair.request("cuda", rank=1)
    cuda(request)
    setattr(request.handles[0].cuda_ipc, field, value)
    refused = refusal(cuda_pair.send(request))
    assert (refused.code, refused.reason) == (INVALID, "INVALID_HANDLE")
    assert said in refused.message
    cuda_pair.assert_untouched()


def test_host_memory_is_refused_for_an_engine_on_gpus(cuda_pair: Pair) -> None:
    refused = refusal(cuda_pair.send(cuda_pair.request("host", rank=1)))
    assert (refused.code, refused.reason) == (PRECONDITION, "MEMORY_KIND_MISMATCH")
    assert "rank 1, bucket 0: host shared memory cannot be loaded by an engine on cuda" in refused.message
    cuda_pair.assert_untouched()


def test_two_ranks_that_send_from_one_gpu_are_refused(cuda_pair: Pair) -> None:
    first, second = (cuda_pair.request("one gpu", rank) for rank in range(2))
    cuda(first)
    cuda(second)
    waiting = cuda_pair.send(first)
    cuda_pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    refused = refusal(cuda_pair.send(second))
    assert (refused.code, refused.reason) == (INVALID, "INVALID_HANDLE")
    assert "ranks 0 and 1 both send from GPU 6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c5d" in refused.message
    waiting.cancel()
    cuda_pair.wait_for(pb.SIDECAR_STATE_READY)
    cuda_pair.assert_untouched()


def test_the_same_rank_twice_is_refused_and_the_first_goes_on(pair: Pair) -> None:
    first = pair.send(pair.request("twice", rank=0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    refused = refusal(pair.send(pair.request("twice", rank=0)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RANK_DELIVERED_TWICE")
    assert "rank 0 has already delivered bucket 0 of update 'twice', from other memory" in refused.message
    assert refused.details == {"rank": "0", "bucket": "0", "updateId": "twice"}
    assert pair.posts() == []
    other = pair.send(pair.request("twice", rank=1))
    assert first.result().outcome.state == other.result().outcome.state == pb.UPDATE_STATE_COMMITTED


def test_ranks_whose_manifests_differ_are_all_told_where(pair: Pair) -> None:
    first = pair.send(pair.request("differ", rank=0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    request = pair.request("differ", rank=1)
    bias = request.manifest.manifest.buckets[0].tensors[1]
    bias.dtype = pb.DATA_TYPE_FLOAT16
    for refused in (refusal(pair.send(request)), refusal(first)):
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "RANKS_DIFFER")
        said = "ranks 0 and 1 differ: tensor 'layer.0.bias': bfloat16 [4] at byte 64 against float16 [4] at byte 64"
        assert said in refused.message
        assert refused.details == {"ranks": "0,1", "updateId": "differ"}
    pair.assert_untouched()
    assert pair.outcome("differ").state == pb.UPDATE_STATE_ABORTED


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("weight_version", "other", "weight_version 'version of versions' against 'other'"),
        ("pause_mode", pb.PAUSE_MODE_ABORT, "pause_mode"),
    ],
)
def test_ranks_whose_headers_differ_are_all_told_how(pair: Pair, field: str, value: object, said: str) -> None:
    first = pair.send(pair.request("versions", rank=0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    request = pair.request("versions", rank=1)
    setattr(request.update, field, value)
    for refused in (refusal(pair.send(request)), refusal(first)):
        assert refused.reason == "RANKS_DIFFER"
        assert f"ranks 0 and 1 differ: {said}" in refused.message
    pair.assert_untouched()


def test_a_second_update_while_one_is_collected_is_refused_and_names_it(pair: Pair) -> None:
    first = pair.send(pair.request("first", rank=0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    refused = refusal(pair.send(pair.request("second", rank=1)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "UPDATE_IN_PROGRESS")
    assert "rank 1 sends update 'second', but update 'first' is collecting and waits for ranks [1]" in refused.message
    first.cancel()
    pair.wait_for(pb.SIDECAR_STATE_READY)
    pair.assert_untouched()


def test_pushes_that_belong_to_nothing_are_refused(pair: Pair) -> None:
    refused = refusal(pair.push("never begun", 0, 0))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UPDATE_UNKNOWN")
    reference = pb.ManifestReference(manifest=pb.Manifest())
    bare = pb.BeginUpdateRequest(update=header("empty", 0), manifest=reference)
    assert refusal(pair.rpc.BeginUpdate.future(bare, timeout=5)).reason == "EMPTY_UPDATE"
    pair.assert_untouched()


def test_pushes_that_do_not_fit_their_update_are_refused(pair: Pair) -> None:
    pair.begin("ill-fitting")
    beyond = refusal(pair.push("ill-fitting", 1, 2))
    assert (beyond.code, beyond.reason) == (INVALID, "INVALID_HANDLE")
    assert "rank 1: bucket 2 is outside 0..1 of update 'ill-fitting'" in beyond.message
    stranger = refusal(pair.push("ill-fitting", 5, 0))
    assert (stranger.code, stranger.reason) == (INVALID, "RANK_OUT_OF_RANGE")
    assert "rank 5 has not begun update 'ill-fitting'" in stranger.message
    early = refusal(pair.commit("ill-fitting", 1))
    assert (early.code, early.reason) == (INVALID, "EMPTY_UPDATE")
    assert "rank 1 commits update 'ill-fitting' without having pushed buckets [0, 1]" in early.message
    pair.rpc.AbortUpdate(pb.AbortUpdateRequest(update_id="ill-fitting", rank=0, reason="test"), timeout=5)
    pair.assert_untouched()


def test_a_message_beyond_the_limit_is_refused_by_grpc_itself(pair: Pair) -> None:
    request = pair.request("large", rank=1)
    request.manifest.manifest.buckets[0].tensors[0].name = "n" * (65 << 20)
    assert failed_call(pair.send(request)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    pair.assert_untouched()


@pytest.mark.parametrize(
    ("release", "server_info", "said"),
    [
        ("0.5.23", {"pp_size": 2}, "pipeline parallelism (pp_size > 1)"),
        ("0.5.23", {"version": "0.5.14"}, "SGLang 0.5.14 is older than 0.5.15.post1"),
    ],
)
def test_an_engine_that_cannot_be_updated_is_said_so(
    start: StartPair, release: str, server_info: dict[str, object], said: str
) -> None:
    pair = start(release=release, server_info=server_info)
    refused = refusal(pair.send(pair.request("hopeless")))
    assert (refused.code, refused.reason) == (PRECONDITION, "ENGINE_UNSUPPORTED")
    assert said in refused.message
    assert pair.posts() == []
    assert said in pair.status().reason
    capabilities = pair.rpc.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=5)
    assert said in capabilities.engine.unsupported_reason


def test_an_engine_that_just_died_refuses_the_update(start: StartPair) -> None:
    pair = start()
    pair.engine.die()
    for rank, answer in enumerate([pair.send(pair.request("dead", rank)) for rank in range(2)]):
        refused = refusal(answer)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNREACHABLE"), rank
        assert f"the engine at {pair.engine.url} cannot be reached" in refused.message
        assert refused.details["engineUrl"] == pair.engine.url
    assert pair.posts() == []
    assert pair.counts() == [2, 2]
