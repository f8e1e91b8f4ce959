"""Each rank must send from the GPU that the engine's rank runs on, where that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest

from sidecar.inspect import describe
from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.conftest import StartPair, counters
from tests.integration.support import ANSWER_S, LOAD, Pair, header, manifest, refusal

FIRST, SECOND, OTHER = (f"6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c6{number}" for number in range(3))
NAMED = f"GPU-{FIRST.upper()},{SECOND}"
COUNTERS = "torch_test_gpus"

Forms = Callable[[str], str]


@pytest.fixture(autouse=True)
def _counters() -> Iterator[None]:
    with counters(COUNTERS):
        yield


def handle(uuid: str, rank: int) -> pb.MemoryHandle:
    return pb.MemoryHandle(
        cuda_ipc=pb.CudaIpcHandle(
            device_uuid=uuid,
            memory_handle=b"\x01c" + bytes([rank]) * 64,
            storage_size_bytes=128,
            ref_counter_handle=f"/{COUNTERS}",
            ref_counter_offset=rank,
        )
    )


def request(update_id: str, rank: int, uuid: str) -> pb.UpdateWeightsRequest:
    return pb.UpdateWeightsRequest(
        update=header(update_id, rank),
        manifest=pb.ManifestReference(manifest=manifest()),
        handles=[handle(uuid, rank)],
    )


@pytest.fixture
def on_gpus(start: StartPair) -> Pair:
    """An engine whose operator has named its GPUs."""
    return start("--gpu-uuids", NAMED, device="cuda")


def test_the_engines_gpus_are_told_to_whoever_asks(on_gpus: Pair) -> None:
    named = [f"GPU-{FIRST}", f"GPU-{SECOND}"]
    assert list(on_gpus.rpc.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=ANSWER_S).engine.gpu_uuids) == named
    assert list(on_gpus.status().engine.gpu_uuids) == named
    assert f"gpus:    {', '.join(named)}" in describe(on_gpus.status()).splitlines()


@pytest.mark.parametrize("form", [str, str.upper, "GPU-{}".format, lambda uuid: f"GPU-{uuid.upper()}"])
def test_ranks_on_the_engines_gpus_are_loaded_however_the_uuids_are_written(on_gpus: Pair, form: Forms) -> None:
    answers = [on_gpus.send(request("right", rank, form(uuid))) for rank, uuid in enumerate((FIRST, SECOND))]
    for answer in answers:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    (load,) = [call for call in on_gpus.engine.calls if call.path == LOAD]
    devices = [entry.tensors[0].storage.device for entry in load.entries]  # type: ignore[union-attr]
    assert devices == [FIRST, SECOND], "as torch and SGLang compare them"


@pytest.mark.parametrize(("rank", "engines"), [(0, FIRST), (1, SECOND)])
def test_a_rank_on_another_gpu_is_refused_with_both_named(on_gpus: Pair, rank: int, engines: str) -> None:
    refused = refusal(on_gpus.send(request("wrong", rank, f"GPU-{OTHER}")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GPU_MISMATCH")
    assert f"rank {rank}, bucket 0: the memory is on GPU-{OTHER}, but the engine's TP rank {rank}" in refused.message
    assert f"runs on GPU-{engines}; send rank {rank}'s weights from that GPU" in refused.message
    assert refused.details == {"rank": str(rank), "gpu": f"GPU-{OTHER}", "engineGpu": f"GPU-{engines}"}
    on_gpus.assert_untouched()


def test_ranks_that_have_changed_places_are_refused(on_gpus: Pair) -> None:
    for rank, uuid in enumerate((SECOND, FIRST)):
        assert refusal(on_gpus.send(request("swapped", rank, uuid))).reason == "GPU_MISMATCH"
    on_gpus.assert_untouched()


def test_a_bucket_from_another_gpu_is_refused_and_the_right_one_is_taken(on_gpus: Pair) -> None:
    on_gpus.begin("bucketed", num_buckets=1)

    def push(rank: int, uuid: str) -> grpc.Future[pb.PushBucketResponse]:
        sent = pb.PushBucketRequest(update_id="bucketed", rank=rank, bucket=0, handle=handle(uuid, rank))
        return on_gpus.rpc.PushBucket.future(sent, timeout=ANSWER_S)

    assert refusal(push(1, FIRST)).reason == "GPU_MISMATCH"
    assert on_gpus.posts() == []
    for pushed in [push(rank, uuid) for rank, uuid in enumerate((FIRST, SECOND))]:
        pushed.result(ANSWER_S)
    for committed in [on_gpus.commit("bucketed", rank) for rank in range(2)]:
        assert committed.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


@pytest.mark.parametrize("layout", [{}, {"nnodes": 2}])
def test_another_number_of_gpus_than_ranks_is_said_and_refuses_every_update(
    start: StartPair, layout: dict[str, object]
) -> None:
    pair = start("--gpu-uuids", FIRST, device="cuda", server_info=layout)
    refused = refusal(pair.send(request("one gpu", 0, FIRST)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_UNSUPPORTED")
    assert "--gpu-uuids names 1 GPUs, but the engine has tp_size 2; name one for each TP rank" in refused.message
    assert "--gpu-uuids names 1 GPUs" in pair.status().reason
    assert pair.posts() == []


def test_where_the_gpus_are_not_known_any_is_taken(cuda_pair: Pair) -> None:
    assert list(cuda_pair.status().engine.gpu_uuids) == []
    answers = [cuda_pair.send(request("unknown", rank, uuid)) for rank, uuid in enumerate((SECOND, OTHER))]
    for answer in answers:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_an_engine_on_the_cpu_takes_no_notice_of_gpus(start: StartPair) -> None:
    pair = start("--gpu-uuids", FIRST)
    assert list(pair.status().engine.gpu_uuids) == []
    assert pair.update("on the cpu").state == pb.UPDATE_STATE_COMMITTED
