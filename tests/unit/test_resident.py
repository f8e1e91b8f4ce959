"""Tensors that lie in exportable memory are sent from there; those that do not are refused in a sentence."""

import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from adapter.errors import MemoryNotExportable
from adapter.exportable import allocate_flat, is_shared_file
from adapter.exports import TORCH_HEADER_BYTES, Export
from adapter.resident import ResidentBuckets, listed
from adapter.sources import LazyTensor, PlainTensor, Sendable
from tests.fakes import shared_memory

SHM = Path("/dev/shm")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = files_of_this_process()
    yield
    gc.collect()
    assert files_of_this_process() <= before


def files_of_this_process() -> set[str]:
    return {path.name for path in SHM.glob(f"torch_{os.getpid()}_*")}


def flat_model() -> dict[str, torch.Tensor]:
    """Two tensors with a gap between them, and the first one again under another name."""
    flat = allocate_flat(1024, CPU)
    flat.copy_(torch.arange(1024) % 251)
    first = flat[64:128].view(torch.float32).view(4, 4)
    return {"a": first, "b": flat[256:262].view(torch.bfloat16), "tied": first}


def resident(tensors: Mapping[str, Sendable], exports: dict[tuple[int, int], Export] | None = None) -> ResidentBuckets:
    return ResidentBuckets(listed(tensors.items()), {} if exports is None else exports, allow_expandable=False)


def test_one_storage_is_one_bucket_with_the_tensors_where_they_lie() -> None:
    buckets = resident(flat_model())
    (bucket,) = buckets.plan.buckets
    assert bucket.num_bytes == 1024
    assert [(place.spec.name, place.byte_offset) for place in bucket.placements] == [
        ("a", 64),
        ("b", 256),
        ("tied", 64),
    ]


def test_another_process_reads_the_trainers_own_memory() -> None:
    tensors = flat_model()
    export = resident(tensors).fill(0)
    name = export.handle().shared_memory.name
    assert (SHM / name[1:]).read_bytes()[TORCH_HEADER_BYTES:] == bytes(number % 251 for number in range(1024))
    assert export.flat.data_ptr() == tensors["a"].untyped_storage().data_ptr()
    shared_memory.release(name)


def test_every_storage_is_a_bucket_of_its_own_and_is_exported_by_the_same_export_again() -> None:
    tensors = {"x": allocate_flat(64, CPU), "y": allocate_flat(128, CPU)}
    exports: dict[tuple[int, int], Export] = {}
    first = [resident(tensors, exports).fill(number) for number in range(2)]
    second = [resident(tensors, exports).fill(number) for number in range(2)]
    assert [export.flat.numel() for export in first] == [64, 128]
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_regions_that_are_sent_no_more_are_forgotten() -> None:
    """An export keeps its memory alive: a trainer that makes a new buffer at each step must not pile them up."""
    exports: dict[tuple[int, int], Export] = {}
    for _ in range(3):
        resident(flat_model(), exports).fill(0)
        assert len(exports) == 1


def test_what_is_fused_must_lie_in_one_storage() -> None:
    names = [f"l.{part}.weight" for part in ("q_a_proj", "kv_a_proj_with_mqa")]
    apart = {name: allocate_flat(64, CPU) for name in names}
    with pytest.raises(ValueError, match=r"l\.q_a_proj\.weight and l\.kv_a_proj_with_mqa\.weight must travel together"):
        resident(apart)


class Computed(LazyTensor):
    """Something that has no memory of its own."""

    dtype, shape = torch.float32, (2,)

    def write(self, destination: torch.Tensor) -> None:
        raise AssertionError

    def local_tensors(self) -> list[torch.Tensor]:
        return [torch.ones(2)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(4, 2).t(), "is not contiguous"),
        (torch.ones(1, 2).expand(3, 2), "is not contiguous"),
        (PlainTensor(torch.ones(2), torch.bfloat16), "must be cast from torch.float32 to torch.bfloat16"),
        (Computed(), "must be gathered or computed"),
    ],
    ids=["transposed", "overlapping", "cast", "computed"],
)
def test_what_would_need_a_copy_is_refused(value: Sendable, words: str) -> None:
    with pytest.raises(ValueError, match=f"tensor w {words}.*in place"):
        resident({"w": value})


def test_host_memory_that_no_other_process_can_open_is_refused() -> None:
    with pytest.raises(MemoryNotExportable, match=r"tensor w does not lie in a file of /dev/shm; use .*allocate_flat"):
        resident({"w": torch.ones(4)})


def test_a_file_that_is_there_is_told_from_memory_without_one() -> None:
    assert is_shared_file(allocate_flat(64, CPU).untyped_storage())
    assert not is_shared_file(torch.ones(64).untyped_storage())
    assert not is_shared_file(torch.ones(64).untyped_storage().share_memory_())  # a file without a name


@pytest.mark.parametrize("pairs", [[], [("w", torch.ones(1)), ("w", torch.ones(1))]], ids=["empty", "twice"])
def test_names_are_checked_as_in_any_update(pairs: list[tuple[str, Sendable]]) -> None:
    with pytest.raises(ValueError, match=r"the update is empty|the name w comes 2 times"):
        listed(pairs)
