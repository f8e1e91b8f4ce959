"""Every refusal is one status with one sentence that names rank, tensor and value; the engine has not been touched."""

import secrets
from collections.abc import Callable

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.support import Pair, Refusal, refusal

Spoil = Callable[[pb.UpdateWeightsRequest], None]


def first_tensor(change: Callable[[pb.TensorSpec], None]) -> Spoil:
    return lambda request: change(request.manifest.manifest.buckets[0].tensors[0])


def set_to(name: str, value: object) -> Callable[[pb.TensorSpec], None]:
    return lambda tensor: setattr(tensor, name, value)


def reshape(*shape: int) -> Callable[[pb.TensorSpec], None]:
    def change(tensor: pb.TensorSpec) -> None:
        tensor.shape[:] = shape

    return change


def header_field(name: str, value: object) -> Spoil:
    return lambda request: setattr(request.update, name, value)


def shared(name: str, value: object) -> Spoil:
    return lambda request: setattr(request.handles[0].shared_memory, name, value)


def cuda(request: pb.UpdateWeightsRequest) -> None:
    request.handles[0].CopyFrom(pb.MemoryHandle(cuda_ipc=pb.CudaIpcHandle(device_uuid="GPU-1", storage_size_bytes=128)))


def no_handles(request: pb.UpdateWeightsRequest) -> None:
    del request.handles[:]


def no_buckets(request: pb.UpdateWeightsRequest) -> None:
    del request.manifest.manifest.buckets[:]


def no_tensors(request: pb.UpdateWeightsRequest) -> None:
    del request.manifest.manifest.buckets[0].tensors[:]


def same_name_twice(request: pb.UpdateWeightsRequest) -> None:
    tensors = request.manifest.manifest.buckets[0].tensors
    tensors[1].name = tensors[0].name


def a_third_handle_kind(request: pb.UpdateWeightsRequest) -> None:
    request.handles[0].Clear()
    request.handles[0].MergeFromString(b"\x1a\x00")  # field 3, an empty message


def an_unknown_header_field(request: pb.UpdateWeightsRequest) -> None:
    request.update.MergeFromString(b"\xf8\x07\x01")  # field 127 = 1


WEIGHT = "rank 1, bucket 0, tensor 'layer.0.weight': "
HANDLE = "rank 1, bucket 0: "

PRECONDITIONS = ("TP_SIZE_MISMATCH", "MEMORY_KIND_MISMATCH")

BAD = [
    pytest.param(header_field("rank", 2), "RANK_OUT_OF_RANGE", "rank 2 is outside 0..1", id="rank-outside"),
    pytest.param(
        header_field("rank", 2**32 - 1), "RANK_OUT_OF_RANGE", "rank 4294967295 is outside", id="rank-far-outside"
    ),
    pytest.param(
        header_field("tp_size", 4),
        "TP_SIZE_MISMATCH",
        "rank 1: the trainer sends from 4 ranks, but the engine has tp_size 2",
        id="tp-size",
    ),
    pytest.param(
        header_field("update_id", ""), "INVALID_HEADER", "rank 1: update_id must be 1 to 128", id="no-update-id"
    ),
    pytest.param(
        header_field("weight_version", ""), "INVALID_HEADER", "rank 1: weight_version must be", id="no-version"
    ),
    pytest.param(header_field("pause_mode", 99), "INVALID_HEADER", "rank 1: pause mode 99 is unknown", id="pause-mode"),
    pytest.param(
        lambda r: r.ClearField("update"), "INVALID_HEADER", "rank 0: update_id must be 1 to 128", id="no-header"
    ),
    pytest.param(
        first_tensor(set_to("dtype", 0)), "INVALID_TENSOR", WEIGHT + "unknown dtype unspecified", id="dtype-unset"
    ),
    pytest.param(
        first_tensor(set_to("dtype", 99)), "INVALID_TENSOR", WEIGHT + "unknown dtype number 99", id="dtype-unknown"
    ),
    pytest.param(
        first_tensor(reshape(2, 4)),
        "INVALID_TENSOR",
        WEIGHT + "shape [2, 4] of float32 takes 32 bytes, but size_bytes is 24",
        id="shape",
    ),
    pytest.param(
        first_tensor(reshape(-2, -3)), "INVALID_TENSOR", WEIGHT + "shape [-2, -3] has a negative", id="shape-negative"
    ),
    pytest.param(
        first_tensor(set_to("size_bytes", 25)),
        "INVALID_TENSOR",
        WEIGHT + "shape [2, 3] of float32 takes 24 bytes, but size_bytes is 25",
        id="size",
    ),
    pytest.param(
        first_tensor(set_to("byte_offset", 108)),
        "INVALID_TENSOR",
        WEIGHT + "bytes 108 to 132 reach past the bucket's 128",
        id="offset-outside",
    ),
    pytest.param(
        first_tensor(set_to("byte_offset", 2**64 - 4)),
        "INVALID_TENSOR",
        WEIGHT + "bytes 18446744073709551612 to",
        id="offset-huge",
    ),
    pytest.param(
        first_tensor(set_to("byte_offset", 2)),
        "INVALID_TENSOR",
        WEIGHT + "byte_offset 2 is not a multiple of the element size 4",
        id="offset-misaligned",
    ),
    pytest.param(
        first_tensor(set_to("name", "")), "INVALID_TENSOR", "rank 1, bucket 0, tensor '': a name must", id="no-name"
    ),
    pytest.param(same_name_twice, "INVALID_TENSOR", WEIGHT + "this name appears twice", id="name-twice"),
    pytest.param(no_handles, "INVALID_HANDLE", "rank 1: 0 memory handles for 1 buckets", id="no-handles"),
    pytest.param(
        shared("size_bytes", 127),
        "INVALID_HANDLE",
        HANDLE + "the memory handle spans 127 bytes, the bucket needs 128",
        id="handle-small",
    ),
    pytest.param(shared("size_bytes", 129), "INVALID_HANDLE", "has 192 bytes, too few for 129", id="handle-overstated"),
    pytest.param(
        shared("name", "/../etc/passwd"),
        "INVALID_HANDLE",
        HANDLE + "shared memory: '/../etc/passwd' is not of the form /name",
        id="handle-name",
    ),
    pytest.param(
        shared("name", "/a\0b"),
        "INVALID_HANDLE",
        HANDLE + "shared memory: '/a\\x00b' is not of the form /name",
        id="handle-null",
    ),
    pytest.param(
        shared("name", "/torch_gone"),
        "INVALID_HANDLE",
        HANDLE + "shared memory: cannot see /torch_gone",
        id="handle-gone",
    ),
    pytest.param(
        shared("manager_path", "/nowhere"),
        "INVALID_HANDLE",
        HANDLE + "cannot see torch_shm_manager's socket '/nowhere'",
        id="handle-manager",
    ),
    pytest.param(
        lambda r: r.handles[0].Clear(), "INVALID_HANDLE", HANDLE + "the memory handle is of no kind", id="handle-unset"
    ),
    pytest.param(
        cuda, "MEMORY_KIND_MISMATCH", HANDLE + "CUDA IPC cannot be loaded by an engine on cpu", id="handle-kind"
    ),
    pytest.param(
        lambda r: r.ClearField("manifest"), "EMPTY_UPDATE", "rank 1: the update has no manifest", id="no-manifest"
    ),
    pytest.param(no_buckets, "EMPTY_UPDATE", "rank 1: the update has no bucket", id="no-buckets"),
    pytest.param(no_tensors, "EMPTY_UPDATE", HANDLE + "holds no tensor", id="no-tensors"),
    pytest.param(
        a_third_handle_kind, "UNKNOWN_FIELD", "field 3 of MemoryHandle is unknown to this sidecar", id="future-kind"
    ),
    pytest.param(an_unknown_header_field, "UNKNOWN_FIELD", "field 127 of UpdateHeader is unknown", id="future-field"),
]


@pytest.mark.parametrize(("spoil", "reason", "said"), BAD)
def test_a_bad_request_is_refused_and_nothing_is_touched(pair: Pair, spoil: Spoil, reason: str, said: str) -> None:
    request = pair.request(secrets.token_hex(4), rank=1)
    spoil(request)
    refused = refusal(pair.send(request))
    wrong_request, wrong_engine = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    code = wrong_engine if reason in PRECONDITIONS else wrong_request
    assert (refused.code, refused.reason) == (code, reason)
    assert said in refused.message
    assert_details_repeat_the_message(refused)
    pair.assert_untouched()


def assert_details_repeat_the_message(refused: Refusal) -> None:
    """Programs need not parse sentences: ErrorInfo has every value that they name."""
    assert refused.details
    for name in ("rank", "bucket", "tensor"):
        assert refused.details.get(name, "") in refused.message
