"""What an engine can join, what may come over it, and what a refused receive has left."""

import dataclasses

import pytest

from sidecar.errors import InvalidRequest, Reason, UnsuitableEngine
from sidecar.group import Group, check_dense, tensors_of, wrote_nothing
from sidecar.manifest import BucketSpec, Manifest, TensorSpec

GROUP = Group(name="update-7", master_address="trainer", master_port=29500, rank_offset=1, world_size=3, backend="nccl")


def tensor(name: str, offset: int, elements: int = 4, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, (elements,), offset, elements * 4)


def bucket(*tensors: TensorSpec, size_bytes: int = 32) -> BucketSpec:
    return BucketSpec(size_bytes, tensors)


def check(tp_size: int = 2, device: str = "cuda", **changes: object) -> None:
    dataclasses.replace(GROUP, **changes).check(tp_size, device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank_offset": 6, "world_size": 8},
        {"name": "x" * 128, "master_address": "h" * 253, "master_port": 65535},
        {"tp_size": 1, "world_size": 2},
        {"backend": "gloo", "device": "cpu"},
        {"backend": "gloo"},
    ],
)
def test_a_group_that_has_room_for_the_engine_passes(changes: dict[str, object]) -> None:
    check(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ""}, "group_name must be 1 to 128 printable characters, not ''"),
        ({"name": "x" * 129}, "group_name must be 1 to 128"),
        ({"name": "a\nb"}, r"group_name must be 1 to 128 printable characters, not 'a\\nb'"),
        ({"master_address": ""}, "address must be 1 to 253"),
        ({"master_address": "h" * 254}, "address must be 1 to 253"),
        ({"master_port": 0}, "master_port 0 is no port"),
        ({"master_port": 65536}, "master_port 65536 is no port"),
        ({"rank_offset": 0}, "the engine's 2 ranks from 0 on do not fit behind rank 0 into a group of 3"),
        ({"rank_offset": 2}, "the engine's 2 ranks from 2 on do not fit"),
        ({"world_size": 2}, "the engine's 2 ranks from 1 on do not fit"),
        ({"world_size": 1 << 17}, "into a group of 131072"),
        ({"backend": "mpi"}, "backend 'mpi' is none of nccl, gloo"),
        ({"backend": ""}, "backend '' is none of"),
    ],
)
def test_a_group_that_an_engine_cannot_be_in_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        check(**changes)  # type: ignore[arg-type]
    assert raised.value.reason is Reason.INVALID_GROUP
    assert len(raised.value.message) < 500


def test_nccl_is_for_engines_on_gpus() -> None:
    with pytest.raises(
        UnsuitableEngine, match="backend nccl needs GPUs, and the engine runs on cpu; use gloo"
    ) as raised:
        check(device="cpu")
    assert raised.value.reason is Reason.GROUP_UNSUITABLE
    assert raised.value.details == {"backend": "nccl", "device": "cpu"}


def test_tensors_that_lie_densely_pass() -> None:
    check_dense(Manifest((bucket(tensor("a", 0), tensor("b", 16)), bucket(tensor("c", 0, 8)))))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (bucket(tensor("a", 16)), "bucket 1, tensor 'a': over a group .* must begin at byte 0, not 16"),
        (bucket(tensor("a", 0, 2), tensor("b", 16)), "bucket 1, tensor 'b': .* must begin at byte 8, not 16"),
        (bucket(tensor("a", 16), tensor("b", 0)), "bucket 1, tensor 'a': .* must begin at byte 0, not 16"),
        (bucket(tensor("a", 0)), "bucket 1: its tensors take 16 bytes, .* size_bytes must be as much, not 32"),
    ],
    ids=["gap before", "gap between", "another order", "gap after"],
)
def test_tensors_with_room_between_them_are_refused(second: BucketSpec, said: str) -> None:
    first = bucket(tensor("x", 0), tensor("y", 16))
    with pytest.raises(InvalidRequest, match=said) as raised:
        check_dense(Manifest((first, second)))
    assert raised.value.reason is Reason.INVALID_TENSOR


def test_sglang_is_told_names_dtypes_and_shapes_in_order() -> None:
    both = (TensorSpec("w", "bfloat16", (2, 3), 0, 12), TensorSpec("scale", "float8_e4m3fn", (), 12, 1))
    told = tensors_of(BucketSpec(13, both))
    assert told == {"names": ["w", "scale"], "dtypes": ["bfloat16", "float8_e4m3fn"], "shapes": [[2, 3], []]}


BROKEN = "Failed to update parameter online: x. The full weights of the ModelRunner are partially updated."
NOT_RECEIVED = "the engine at http://e answered 400 to /u: Failed to receive weights: connection closed by peer"


@pytest.mark.parametrize(
    ("said", "num_ranks", "one_model", "nothing"),
    [
        (NOT_RECEIVED, 1, True, True),
        (NOT_RECEIVED, 1, False, True),
        (NOT_RECEIVED, 2, True, False),
        ("update_weights_from_distributed must run between begin and end", 2, True, True),
        ("models with such a cache are not supported", 2, True, True),
        ("models with such a cache are not supported", 1, False, False),
        (BROKEN, 1, True, False),
        ("", 1, True, False),
    ],
)
def test_what_a_refused_receive_has_left(said: str, num_ranks: int, one_model: bool, nothing: bool) -> None:
    """What the first rank has not received, another may have loaded."""
    assert wrote_nothing(said, num_ranks, one_model=one_model) is nothing
