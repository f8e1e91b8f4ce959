"""Buckets hold exactly the planned bytes, in few buffers that stay, whatever tensors they come from."""

import gc
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter.errors import WeightSyncError
from adapter.exports import TORCH_HEADER_BYTES, Export
from adapter.planner import Plan, TensorSpec, plan
from adapter.sources import LazyTensor, PlainTensor, Sendable
from adapter.sources.gather import as_bytes
from adapter.staging import StagedBuckets, StagingBuffers, buffer_bytes, view_of
from tests.fakes import shared_memory
from tests.fakes.shared_memory import files_of_this_process

SHM = Path("/dev/shm")
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = files_of_this_process()
    yield
    gc.collect()
    assert files_of_this_process() <= before


class View(NamedTuple):
    """One way to look at a piece of memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def tensor(self, seed: int) -> torch.Tensor:
        """Over memory of random bytes, larger than needed."""
        reach = sum(max(size - 1, 0) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        generator = torch.Generator().manual_seed(seed)
        num_bytes = (self.offset + reach + 2) * self.dtype.itemsize
        memory = torch.randint(0, 2, (num_bytes,), dtype=torch.uint8, generator=generator)
        return memory.view(self.dtype).as_strided(self.shape, self.strides, self.offset)


@st.composite
def views(draw: st.DrawFn) -> View:
    """Any strides, also of 0 and overlapping ones, and any offset."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    strides = draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape)))
    return View(draw(st.sampled_from(DTYPES)), tuple(shape), tuple(strides), draw(st.integers(0, 5)))


def named(tensors: Sequence[torch.Tensor]) -> list[tuple[str, Sendable]]:
    return [(f"w{number}", tensor) for number, tensor in enumerate(tensors)]


def planned(tensors: Sequence[torch.Tensor], bucket_bytes: int) -> Plan:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named(tensors)]
    return plan(specs, bucket_bytes)


def bytes_seen_by_others(export: Export) -> bytes:
    """What another process reads of a region that is lent to it, which lets it go."""
    name = export.handle().shared_memory.name
    content = (SHM / name[1:]).read_bytes()[TORCH_HEADER_BYTES:]
    shared_memory.release(name)
    return content


@given(st.lists(views(), min_size=1, max_size=8), st.integers(1, 600), st.integers(1, 3))
def test_another_process_reads_every_tensor_of_any_strides_offsets_and_dtypes(
    kinds: list[View], bucket_bytes: int, num_buffers: int
) -> None:
    tensors = [kind.tensor(seed) for seed, kind in enumerate(kinds)]
    buffers = StagingBuffers(num_buffers)
    staged = StagedBuckets(planned(tensors, bucket_bytes), iter(named(tensors)), buffers, CPU)
    for number, bucket in enumerate(staged.plan.buckets):
        content = bytes_seen_by_others(staged.fill(number))
        for place in bucket.placements:
            expected = tensors[int(place.spec.name[1:])].clone(memory_format=torch.contiguous_format)
            start = place.byte_offset
            assert content[start : start + place.spec.num_bytes] == bytes(as_bytes(expected).tolist())
        assert buffers.num_bytes <= sum(buffer_bytes(staged.plan, num_buffers))
    staged.expect_end()
    buffers.release()


def test_buffers_take_turns_and_stay_from_update_to_update() -> None:
    tensors = [torch.full((16,), float(n)) for n in range(5)]
    buffers = StagingBuffers(2)
    seen = []
    for _ in range(2):
        staged = StagedBuckets(planned(tensors, 64), iter(named(tensors)), buffers, CPU)
        seen += [staged.fill(number).flat.data_ptr() for number in range(5)]
    assert len(set(seen)) == 2
    assert seen == [seen[0], seen[1], seen[0], seen[1], seen[0]] * 2
    assert buffers.num_bytes == 128
    buffers.release()
    assert buffers.num_bytes == 0


def test_each_buffer_is_as_large_as_the_largest_bucket_that_it_carries() -> None:
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in (64, 1000, 64, 64, 640)]
    assert buffer_bytes(planned(tensors, 64), 2) == [640, 1024]
    assert buffer_bytes(planned(tensors, 1 << 20), 2) == [64 + 1024 + 64 + 64 + 640]


def test_a_larger_plan_gets_larger_buffers_and_a_smaller_one_keeps_them() -> None:
    buffers = StagingBuffers(1)
    for size, expected in ((64, 64), (640, 640), (128, 640)):
        tensors = [torch.zeros(size, dtype=torch.uint8)]
        StagedBuckets(planned(tensors, 1 << 20), iter(named(tensors)), buffers, CPU).fill(0)
        assert buffers.num_bytes == expected
    buffers.release()


def test_a_buffer_that_an_engine_keeps_is_not_written_again(caplog: pytest.LogCaptureFixture) -> None:
    buffers = StagingBuffers(1)
    first, second = [torch.full((64,), value, dtype=torch.uint8) for value in (1, 2)]
    kept = StagedBuckets(planned([first], 64), iter(named([first])), buffers, CPU).fill(0)
    name = kept.handle().shared_memory.name
    with caplog.at_level(logging.WARNING):
        again = StagedBuckets(planned([second], 64), iter(named([second])), buffers, CPU).fill(0)
    assert again is not kept
    assert kept.flat.tolist() == [1] * 64
    assert not buffers.keeps(kept)
    assert "the engine still holds 64 bytes of a failed update; this one takes as much again" in caplog.text
    shared_memory.release(name)
    kept.drop()
    buffers.release()


def test_memory_that_an_engine_keeps_is_not_given_back_with_the_buffers() -> None:
    buffers = StagingBuffers(1)
    tensor = torch.ones(64, dtype=torch.uint8)
    kept = StagedBuckets(planned([tensor], 64), iter(named([tensor])), buffers, CPU).fill(0)
    name = kept.handle().shared_memory.name
    buffers.release()
    assert kept.flat.tolist() == [1] * 64
    shared_memory.release(name)
    kept.drop()


@pytest.mark.parametrize(
    ("yielded", "words"),
    [
        ([("v", torch.ones(2))], "expected tensor w torch.float32 [2] next, but got v torch.float32 [2]"),
        ([("w", torch.ones(3))], "expected tensor w torch.float32 [2] next, but got w torch.float32 [3]"),
        ([("w", torch.ones(2).half())], "expected tensor w torch.float32 [2] next, but got w torch.float16 [2]"),
        ([], "expected tensor w torch.float32 [2] next, but named_tensors has ended"),
    ],
    ids=["name", "shape", "dtype", "ended"],
)
def test_what_is_not_as_planned_is_not_staged(yielded: list[tuple[str, Sendable]], words: str) -> None:
    buffers = StagingBuffers(1)
    specs = [TensorSpec("w", torch.float32, (2,))]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        StagedBuckets(plan(specs, 64), iter(yielded), buffers, CPU).fill(0)
    assert str(caught.value) == words
    buffers.release()


def test_a_tensor_after_the_last_planned_one_is_an_error() -> None:
    buffers = StagingBuffers(1)
    pairs = named([torch.ones(2), torch.ones(2)])
    staged = StagedBuckets(plan([TensorSpec("w0", torch.float32, (2,))], 64), iter(pairs), buffers, CPU)
    staged.fill(0)
    with pytest.raises(ValueError, match="named_tensors yields w1 after the last of specs; list it there"):
        staged.expect_end()
    buffers.release()


class Counted(LazyTensor):
    """Notes how it was brought."""

    def __init__(self) -> None:
        self.dtype, self.shape = torch.float32, (2,)
        self.calls: list[str] = []

    def write(self, destination: torch.Tensor) -> None:
        self.calls.append("write")

    def forgo(self, device: torch.device) -> None:
        self.calls.append("forgo")


@pytest.mark.parametrize("num_filled", [0, 1, 2])
def test_every_gather_happens_once_whatever_was_staged_before_it_broke_off(num_filled: int) -> None:
    tensors = [Counted() for _ in range(3)]
    specs = [TensorSpec(f"w{number}", torch.float32, (2,)) for number in range(3)]
    pairs: list[tuple[str, Sendable]] = [(f"w{number}", tensor) for number, tensor in enumerate(tensors)]
    buffers = StagingBuffers(2)
    staged = StagedBuckets(plan(specs, 64), iter(pairs), buffers, CPU)
    for number in range(num_filled):
        staged.fill(number)
    staged.forgo()
    assert [tensor.calls for tensor in tensors] == [["write"]] * num_filled + [["forgo"]] * (3 - num_filled)
    buffers.release()


def test_a_tensor_that_does_not_fit_the_plan_is_gathered_for_the_others() -> None:
    tensor, buffers = Counted(), StagingBuffers(1)
    staged = StagedBuckets(plan([TensorSpec("other", torch.float32, (2,))], 64), iter([("w", tensor)]), buffers, CPU)
    with pytest.raises(ValueError, match="expected tensor other"):
        staged.fill(0)
    staged.forgo()
    assert tensor.calls == ["forgo"]
    buffers.release()


def test_a_cast_happens_on_the_way() -> None:
    buffers = StagingBuffers(1)
    tensor = PlainTensor(torch.tensor([1.5, -2.0]), torch.bfloat16)
    staged = StagedBuckets(plan([TensorSpec("w", torch.bfloat16, (2,))], 64), iter([("w", tensor)]), buffers, CPU)
    export = staged.fill(0)
    assert view_of(export.flat, staged.plan.buckets[0].placements[0]).tolist() == [1.5, -2.0]
    buffers.release()


def test_an_iterator_may_reuse_one_buffer_for_every_tensor() -> None:
    """A trainer that unshards into scratch memory: each tensor is copied before the next one is asked for."""
    scratch = torch.zeros(4)

    def tensors() -> Iterator[tuple[str, Sendable]]:
        for value in range(3):
            yield f"w{value}", scratch.fill_(value)

    specs = [TensorSpec(f"w{value}", torch.float32, (4,)) for value in range(3)]
    buffers = StagingBuffers(1)
    staged = StagedBuckets(plan(specs, 1 << 20), tensors(), buffers, CPU, one_by_one=True)
    flat = staged.fill(0).flat
    arrived = [view_of(flat, place).tolist() for place in staged.plan.buckets[0].placements]
    assert arrived == [[0.0] * 4, [1.0] * 4, [2.0] * 4]
    buffers.release()


def test_a_bad_tensor_of_an_iterator_is_refused_as_any_other() -> None:
    buffers = StagingBuffers(1)
    pairs: list[tuple[str, Sendable]] = [("w", torch.empty(2, device="meta"))]
    staged = StagedBuckets(plan([TensorSpec("w", torch.float32, (2,))], 64), iter(pairs), buffers, CPU, one_by_one=True)
    with pytest.raises(ValueError, match="tensor w is on the meta device"):
        staged.fill(0)
    buffers.release()


def test_a_buffer_that_is_not_let_go_within_an_update_is_not_replaced_for_ever() -> None:
    tensors = [torch.full((64,), value, dtype=torch.uint8) for value in range(2)]
    buffers = StagingBuffers(1)
    staged = StagedBuckets(planned(tensors, 64), iter(named(tensors)), buffers, CPU)
    kept = staged.fill(0)
    name = kept.handle().shared_memory.name
    with pytest.raises(WeightSyncError, match="answered for bucket 0 and still holds its memory"):
        staged.fill(1)
    shared_memory.release(name)
    buffers.release()


def test_there_is_no_staging_without_a_buffer() -> None:
    with pytest.raises(ValueError, match="staging_buffers must be 1 or more, not 0"):
        StagingBuffers(0)
