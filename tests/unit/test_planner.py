"""The plan's promises, on any list of tensors, names and groups."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter import wire
from adapter.planner import ALIGNMENT, Placement, TensorSpec, plan
from sidecar import convert
from sidecar.manifest import check

DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.bool])
SHAPES = st.lists(st.integers(min_value=0, max_value=40), max_size=3).map(tuple)
MANY_SPECS = st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=30).map(
    lambda kinds: [TensorSpec(f"layer.{number}", dtype, shape) for number, (dtype, shape) in enumerate(kinds)]
)
BUCKET_BYTES = st.integers(min_value=1, max_value=1 << 16)


@given(MANY_SPECS, BUCKET_BYTES)
def test_every_tensor_is_planned_once_and_in_order(specs: list[TensorSpec], bucket_bytes: int) -> None:
    placed = [place.spec for bucket in plan(specs, bucket_bytes).buckets for place in bucket.placements]
    assert placed == specs


@given(MANY_SPECS, BUCKET_BYTES)
def test_tensors_are_aligned_apart_and_inside_their_bucket(specs: list[TensorSpec], bucket_bytes: int) -> None:
    for bucket in plan(specs, bucket_bytes).buckets:
        end = 0
        for place in bucket.placements:
            assert place.byte_offset % ALIGNMENT == 0
            assert place.byte_offset >= end
            end = place.byte_offset + place.spec.num_bytes
        assert end <= bucket.num_bytes


@given(MANY_SPECS, BUCKET_BYTES)
def test_a_bucket_is_bounded_unless_one_tensor_alone_is_larger(specs: list[TensorSpec], bucket_bytes: int) -> None:
    for bucket in plan(specs, bucket_bytes).buckets:
        weighty = [place for place in bucket.placements if place.spec.num_bytes]
        assert bucket.num_bytes <= max(bucket_bytes, ALIGNMENT) or len(weighty) == 1
        assert bucket.num_bytes > 0


@given(MANY_SPECS, BUCKET_BYTES)
def test_a_bucket_is_closed_only_when_the_next_tensor_does_not_fit(specs: list[TensorSpec], bucket_bytes: int) -> None:
    buckets = plan(specs, bucket_bytes).buckets
    for bucket, following in pairwise(buckets):
        used = sum(_aligned(place) for place in bucket.placements)
        assert used + _aligned(following.placements[0]) > bucket_bytes


@given(MANY_SPECS, BUCKET_BYTES)
def test_every_rank_plans_the_same(specs: list[TensorSpec], bucket_bytes: int) -> None:
    again = [TensorSpec(spec.name, spec.dtype, spec.shape) for spec in specs]
    assert plan(specs, bucket_bytes) == plan(iter(again), bucket_bytes)


@given(MANY_SPECS, BUCKET_BYTES)
def test_the_sidecar_accepts_every_plan(specs: list[TensorSpec], bucket_bytes: int) -> None:
    check(convert.manifest(wire.manifest(plan(specs, bucket_bytes))), rank=0)


def test_a_model_that_fits_is_one_bucket() -> None:
    specs = [TensorSpec(name, torch.bfloat16, (32,)) for name in "abc"]
    assert plan(specs, 3 * 64).buckets == plan(specs, 1 << 40).buckets
    assert len(plan(specs, 3 * 64).buckets) == 1
    assert [len(bucket.placements) for bucket in plan(specs, 3 * 64 - 1).buckets] == [2, 1]


# Names of which some are bound together: parts a, b and c of a group with a number.
GROUPED_NAMES = st.lists(
    st.builds("{}.{}.weight".format, st.integers(0, 5), st.sampled_from(["a", "b", "c", "alone"])),
    min_size=1, max_size=24, unique=True,
)  # fmt: skip
RULES = (re.compile(r"\.(?P<part>a|b)\."), re.compile(r"\.(?P<part>b|c)\."))


def grouped(names: list[str], sizes: list[int]) -> list[TensorSpec]:
    return [TensorSpec(name, torch.uint8, (size,)) for name, size in zip(names, sizes, strict=False)]


@given(GROUPED_NAMES, st.lists(st.integers(1, 300), min_size=24, max_size=24), st.integers(1200, 4000))
def test_what_is_fused_travels_in_one_bucket_and_the_rest_keeps_its_order(
    names: list[str], sizes: list[int], bucket_bytes: int
) -> None:
    specs = grouped(names, sizes)
    planned = plan(specs, bucket_bytes, RULES)
    bucket_of = {place.spec.name: n for n, bucket in enumerate(planned.buckets) for place in bucket.placements}
    assert sorted(planned.names()) == sorted(names)
    for number in range(6):
        parts = {part for part in "abc" if f"{number}.{part}.weight" in bucket_of}
        bound = parts if "b" in parts else set()  # a and c are bound by b alone
        assert len({bucket_of[f"{number}.{part}.weight"] for part in bound}) <= 1
    alone = [name for name in names if "alone" in name]
    assert [name for name in planned.names() if "alone" in name] == alone
    assert all(bucket.num_bytes <= bucket_bytes for bucket in planned.buckets)


def test_a_group_stands_where_its_first_tensor_stood() -> None:
    specs = grouped(["0.alone.weight", "1.a.weight", "2.alone.weight", "1.b.weight"], [1, 1, 1, 1])
    assert plan(specs, 1 << 20, RULES).names() == ["0.alone.weight", "1.a.weight", "1.b.weight", "2.alone.weight"]


def test_a_group_without_room_in_a_bucket_is_an_error_that_names_it() -> None:
    specs = grouped(["1.a.weight", "1.b.weight"], [600, 600])
    with pytest.raises(
        ValueError, match=r"1\.a\.weight and 1\.b\.weight must travel together.* 1280 bytes.*1024; raise"
    ):
        plan(specs, 1024, RULES)


def test_a_name_that_comes_twice_is_an_error() -> None:
    specs = grouped(["w", "v", "w"], [1, 1, 1])
    with pytest.raises(ValueError, match="the name w comes 2 times in named_tensors"):
        plan(specs, 1024)


def test_nothing_to_send_is_an_error() -> None:
    with pytest.raises(ValueError, match="named_tensors yielded no tensor"):
        plan([], 1024)


@pytest.mark.parametrize("bucket_bytes", [0, -1])
def test_a_bucket_needs_room(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"bucket_bytes must be positive, not {bucket_bytes}"):
        plan([TensorSpec("a", torch.uint8, (1,))], bucket_bytes)


def _aligned(place: Placement) -> int:
    return -(-place.spec.num_bytes // ALIGNMENT) * ALIGNMENT
