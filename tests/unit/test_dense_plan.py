"""A dense plan's promises: what SGLang cuts out of a broadcast bucket is what was put there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter.planner import Plan, TensorSpec, plan

DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.bool])
SHAPES = st.lists(st.integers(min_value=1, max_value=40), max_size=3).map(tuple)
MANY_SPECS = st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=30).map(
    lambda kinds: [TensorSpec(f"layer.{number}", dtype, shape) for number, (dtype, shape) in enumerate(kinds)]
)
BUCKET_BYTES = st.integers(min_value=1, max_value=1 << 16)


def dense(specs: list[TensorSpec], bucket_bytes: int = 1 << 20) -> Plan:
    return plan(specs, bucket_bytes, dense=True)


@given(MANY_SPECS, BUCKET_BYTES)
def test_tensors_lie_one_after_the_other_without_gaps(specs: list[TensorSpec], bucket_bytes: int) -> None:
    for bucket in dense(specs, bucket_bytes).buckets:
        end = 0
        for place in bucket.placements:
            assert place.byte_offset == end
            end += place.spec.num_bytes
        assert bucket.num_bytes == end > 0


@given(MANY_SPECS, BUCKET_BYTES)
def test_each_begins_at_a_multiple_of_its_elements_size(specs: list[TensorSpec], bucket_bytes: int) -> None:
    for bucket in dense(specs, bucket_bytes).buckets:
        for place in bucket.placements:
            assert place.byte_offset % place.spec.dtype.itemsize == 0


@given(MANY_SPECS, BUCKET_BYTES)
def test_it_has_the_buckets_of_the_other_plan_with_other_places(specs: list[TensorSpec], bucket_bytes: int) -> None:
    for mine, other in zip(dense(specs, bucket_bytes).buckets, plan(specs, bucket_bytes).buckets, strict=True):
        assert {place.spec for place in mine.placements} == {place.spec for place in other.placements}
        assert mine.num_bytes <= other.num_bytes


@given(MANY_SPECS, BUCKET_BYTES)
def test_every_rank_plans_the_same(specs: list[TensorSpec], bucket_bytes: int) -> None:
    again = [TensorSpec(spec.name, spec.dtype, spec.shape) for spec in specs]
    assert dense(specs, bucket_bytes) == plan(iter(again), bucket_bytes, dense=True)


def test_tensors_of_one_element_size_keep_their_order_behind_the_larger_ones() -> None:
    specs = [
        TensorSpec("a", torch.uint8, (3,)),
        TensorSpec("b", torch.bfloat16, (1,)),
        TensorSpec("c", torch.float32, (1,)),
        TensorSpec("d", torch.float16, (1,)),
        TensorSpec("e", torch.bool, ()),
    ]
    (bucket,) = dense(specs).buckets
    placed = [(place.spec.name, place.byte_offset) for place in bucket.placements]
    assert (placed, bucket.num_bytes) == ([("c", 0), ("b", 4), ("d", 6), ("a", 8), ("e", 11)], 12)


def test_an_empty_tensor_among_others_takes_no_room() -> None:
    specs = [TensorSpec("a", torch.float32, (0, 4)), TensorSpec("b", torch.float32, (4,))]
    (bucket,) = dense(specs).buckets
    assert [place.byte_offset for place in bucket.placements] == [0, 0]
    assert bucket.num_bytes == 16


def test_a_bucket_without_a_byte_cannot_be_broadcast() -> None:
    with pytest.raises(ValueError, match="a and all that goes with it are empty: there is nothing to broadcast"):
        dense([TensorSpec("a", torch.float32, (0,)), TensorSpec("b", torch.uint8, (2, 0))])
