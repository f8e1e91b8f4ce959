"""Tensors that lie in exportable memory are sent from there; those that do not are refused in a sentence."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from adapter.errors import MemoryNotExportable
from adapter.exportable import allocate_flat, is_shared_file
from adapter.exports import TORCH_HEADER_BYTES
from adapter.planner import Plan
from adapter.resident import Layout, Region, ResidentBuckets, Residents, listed
from adapter.sources import LazyTensor, PlainTensor, Sendable
from tests.fakes import shared_memory
from tests.fakes.shared_memory import files_of_this_process

SHM = Path("/dev/shm")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = files_of_this_process()
    yield
    gc.collect()
    assert files_of_this_process() <= before


def flat_model() -> dict[str, torch.Tensor]:
    """Two tensors with a gap between them, and the first one again under another name."""
    flat = allocate_flat(1024, CPU)
    flat.copy_(torch.arange(1024) % 251)
    first = flat[64:128].view(torch.float32).view(4, 4)
    return {"a": first, "b": flat[256:262].view(torch.bfloat16), "tied": first}


def resident(tensors: Mapping[str, Sendable], residents: Residents | None = None) -> ResidentBuckets:
    return (residents or Residents(allow_expandable=False)).buckets(tensors.items())


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
    residents = Residents(allow_expandable=False)
    first = [resident(tensors, residents).fill(number) for number in range(2)]
    second = [resident(tensors, residents).fill(number) for number in range(2)]
    assert [export.flat.numel() for export in first] == [64, 128]
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_regions_that_are_sent_no_more_are_forgotten() -> None:
    """An export keeps its memory alive: a trainer that makes a new buffer at each step must not pile them up."""
    residents = Residents(allow_expandable=False)
    for _ in range(3):
        resident(flat_model(), residents).fill(0)
        assert len(residents._exports) == 1


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


def counted(name: str, value: torch.Tensor, residents: Residents) -> bytes:
    """What another process would read of the one tensor."""
    buckets = residents.buckets([(name, value)])
    (place,) = buckets.plan.buckets[0].placements
    flat = buckets.fill(0).flat
    return bytes(flat[place.byte_offset : place.byte_offset + place.spec.num_bytes].tolist())


def test_tensors_that_come_again_are_laid_out_once_as_other_objects_too() -> None:
    residents, tensors = Residents(allow_expandable=False), flat_model()
    first = resident(tensors, residents)
    first.fill(0)
    again = resident({name: tensor.detach() for name, tensor in tensors.items()}, residents)
    assert again.plan is first.plan
    assert again.fill(0) is first.fill(0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: {**t, "b": t["b"].view(torch.float16)}, id="dtype"),
        pytest.param(lambda t: {**t, "a": t["a"].view(2, 8)}, id="shape"),
        pytest.param(lambda t: {**t, "b": t["a"].view(torch.bfloat16)[:3]}, id="address"),
        pytest.param(lambda t: {"c" if name == "b" else name: tensor for name, tensor in t.items()}, id="name"),
        pytest.param(lambda t: {name: t[name] for name in ("b", "a", "tied")}, id="order"),
        pytest.param(lambda t: {name: t[name] for name in ("a", "b")}, id="fewer"),
    ],
)
def test_tensors_that_differ_in_anything_are_laid_out_anew(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    residents, tensors = Residents(allow_expandable=False), flat_model()
    resident(tensors, residents).fill(0)
    changed = change(tensors)
    assert resident(changed, residents).plan == resident(changed).plan
    assert resident(tensors, residents).plan == resident(tensors).plan


def test_a_tensor_that_was_given_other_memory_is_read_from_there() -> None:
    residents, weight = Residents(allow_expandable=False), torch.nn.Parameter(allocate_flat(64, CPU), False)
    weight.data.fill_(1)
    assert counted("w", weight, residents) == bytes([1]) * 64
    weight.data = allocate_flat(64, CPU).fill_(2)
    assert counted("w", weight, residents) == bytes([2]) * 64
    weight.data = weight.data[:32]
    assert counted("w", weight, residents) == bytes([2]) * 32


def test_a_tensor_that_is_no_longer_contiguous_is_refused_though_its_address_is_the_same() -> None:
    residents, weight = Residents(allow_expandable=False), allocate_flat(64, CPU).view(8, 8)
    resident({"w": weight}, residents).fill(0)
    with pytest.raises(ValueError, match="tensor w is not contiguous"):
        resident({"w": weight.t()}, residents)


def test_the_very_same_objects_are_taken_for_what_they_are_by_now() -> None:
    residents, weight = Residents(allow_expandable=False), torch.nn.Parameter(allocate_flat(64, CPU).view(8, 8), False)
    for _ in range(2):
        resident({"w": weight}, residents).fill(0)
    weight.data = weight.data.view(torch.int16)
    (place,) = resident({"w": weight}, residents).plan.buckets[0].placements
    assert (place.spec.dtype, place.spec.shape) == (torch.int16, (8, 4))
    weight.data = weight.data[:4]
    (place,) = resident({"w": weight}, residents).plan.buckets[0].placements
    assert place.spec.shape == (4, 4)
    weight.t_()
    with pytest.raises(ValueError, match="tensor w is not contiguous"):
        resident({"w": weight}, residents)


def test_a_trainer_may_swap_the_tensors_that_it_has_sent() -> None:
    residents, weight = Residents(allow_expandable=False), allocate_flat(64, CPU).fill_(1)
    assert counted("w", weight, residents) == bytes([1]) * 64
    torch.utils.swap_tensors(weight, allocate_flat(64, CPU).fill_(2))  # type: ignore[no-untyped-call]
    assert counted("w", weight, residents) == bytes([2]) * 64


def test_memory_that_is_out_of_shared_memory_by_now_is_refused() -> None:
    residents, weight = Residents(allow_expandable=False), torch.nn.Parameter(allocate_flat(64, CPU), False)
    resident({"w": weight}, residents).fill(0)
    weight.data = torch.ones(64, dtype=torch.uint8)
    with pytest.raises(MemoryNotExportable, match="tensor w does not lie in a file"):
        resident({"w": weight}, residents)


def read_in_place(flat: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> ResidentBuckets:
    """As laid out; the host's exportable memory cannot be resized, so this stands for a GPU's."""
    region = Region(0, flat.data_ptr(), flat.numel())
    return ResidentBuckets(Layout(Plan(()), (region,)), list(tensors), list(tensors.values()), {})


def test_a_tensor_that_was_freed_while_it_was_read_is_named() -> None:
    flat = torch.zeros(128, dtype=torch.uint8)
    buckets = read_in_place(flat, {"head": flat[:64], "tail": flat[64:]})
    buckets.check_sources()
    flat.untyped_storage().resize_(64)
    with pytest.raises(ValueError, match="tensor tail was freed during the update"):
        buckets.check_sources()


def test_memory_that_was_moved_while_it_was_read_is_told_as_well() -> None:
    flat = torch.zeros(1 << 20, dtype=torch.uint8)
    buckets = read_in_place(flat, {"w": flat})
    address = flat.data_ptr()
    flat.untyped_storage().resize_(1 << 21)
    assert flat.data_ptr() != address
    with pytest.raises(ValueError, match="tensor w was freed during the update"):
        buckets.check_sources()


def test_values_are_looked_at_in_tensors_that_come_again() -> None:
    residents, flat = Residents(allow_expandable=False), allocate_flat(64, CPU)
    weight = flat.view(torch.float32).fill_(1.0)
    for _ in range(2):
        resident({"w": weight}, residents).check_values()
    weight[3] = float("nan")
    with pytest.raises(ValueError, match="tensor w holds NaN"):
        resident({"w": weight}, residents).check_values()


def test_what_is_remembered_keeps_no_memory_once_it_is_let_go() -> None:
    before = files_of_this_process()
    residents, tensors = Residents(allow_expandable=False), flat_model()
    resident(tensors, residents).fill(0)
    gone = weakref.ref(tensors["a"].untyped_storage())
    names = files_of_this_process() - before
    assert names
    residents.clear()
    tensors.clear()
    gc.collect()
    assert gone() is None
    assert files_of_this_process().isdisjoint(names)
