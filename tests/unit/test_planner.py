"""The plan's promises, on any list of tensors."""

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


def test_nothing_to_send_is_an_error() -> None:
    with pytest.raises(ValueError, match="named_tensors yielded no tensor"):
        plan([], 1024)


@pytest.mark.parametrize("bucket_bytes", [0, -1])
def test_a_bucket_needs_room(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"bucket_bytes must be positive, not {bucket_bytes}"):
        plan([TensorSpec("a", torch.uint8, (1,))], bucket_bytes)


def _aligned(place: Placement) -> int:
    return -(-place.spec.num_bytes // ALIGNMENT) * ALIGNMENT
