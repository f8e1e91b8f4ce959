"""Whole tensors that come again are planned once, looked at each time, and copied from where they are now."""

import gc
import re
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from adapter.fusion import DEFAULT_RULES
from adapter.outgoing import Planner, WholeTensors
from adapter.sources import PlainTensor, Sendable
from adapter.staging import CopiedBuckets, StagedBuckets, StagingBuffers, view_of

CPU = torch.device("cpu")
Model = dict[str, torch.Tensor]


@pytest.fixture
def buffers() -> Iterator[StagingBuffers]:
    buffers = StagingBuffers(2)
    yield buffers
    buffers.release()


def model() -> Model:
    """With strides, an offset, an empty one, and two that SGLang fuses."""
    return {
        "l.q_a_proj.weight": torch.ones(4, 4),
        "odd": torch.arange(15.0).view(3, 5).t(),
        "l.kv_a_proj_with_mqa.weight": torch.full((4, 4), 2.0),
        "step": torch.tensor(3),
        "part": torch.arange(10.0)[4:],
        "empty": torch.empty(0, 3),
    }


def planner(bucket_bytes: int = 256) -> Planner:
    return Planner(bucket_bytes, DEFAULT_RULES)


def whole(plans: Planner, tensors: Model) -> WholeTensors:
    cargo = plans.outgoing(tensors.items(), None)
    assert isinstance(cargo, WholeTensors)
    return cargo


def staged(plans: Planner, tensors: Model, buffers: StagingBuffers) -> Model:
    """What arrives."""
    buckets = whole(plans, tensors).staged(buffers, CPU)
    arrived: Model = {}
    for number, bucket in enumerate(buckets.plan.buckets):
        flat = buckets.fill(number).flat
        arrived |= {place.spec.name: view_of(flat, place).clone() for place in bucket.placements}
    buckets.expect_end()
    buckets.check_sources()
    return arrived


def assert_equal(one: Model, other: Model) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bucket_bytes", [128, 256, 1 << 20])
def test_every_update_brings_what_the_tensors_hold_now(buffers: StagingBuffers, bucket_bytes: int) -> None:
    plans, tensors = planner(bucket_bytes), model()
    for number in range(3):
        assert_equal(staged(plans, tensors, buffers), tensors)
        for tensor in tensors.values():
            tensor.add_(number + 1)


def test_a_plan_is_made_once_for_tensors_of_one_form() -> None:
    plans = planner()
    first = whole(plans, model())
    assert whole(plans, model()).planned is first.planned
    assert first.plan == planner().outgoing([(n, PlainTensor(t)) for n, t in model().items()], None).plan


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: {**t, "step": t["step"].to(torch.int32)}, id="dtype"),
        pytest.param(lambda t: {**t, "odd": t["odd"].t()}, id="shape"),
        pytest.param(lambda t: {**t, "odd": t["odd"].contiguous()}, id="strides"),
        pytest.param(lambda t: {**t, "part": t["part"].clone()}, id="offset"),
        pytest.param(lambda t: dict(reversed(t.items())), id="order"),
        pytest.param(lambda t: {name: t[name] for name in list(t)[:-1]}, id="fewer"),
        pytest.param(lambda t: {**t, "one more": torch.ones(2)}, id="more"),
    ],
)
def test_tensors_of_another_form_are_planned_anew(buffers: StagingBuffers, change: Callable[[Model], Model]) -> None:
    plans, tensors = planner(), model()
    staged(plans, tensors, buffers)
    changed = change(model())
    assert whole(plans, changed).plan == whole(planner(), changed).plan
    assert_equal(staged(plans, changed, buffers), changed)
    assert_equal(staged(plans, tensors, buffers), tensors)


def test_a_parameter_that_was_given_other_memory_is_copied_from_there(buffers: StagingBuffers) -> None:
    plans, weight = planner(), torch.nn.Parameter(torch.ones(4))
    staged(plans, {"w": weight}, buffers)
    weight.data = torch.full((4,), 5.0)
    assert staged(plans, {"w": weight}, buffers)["w"].tolist() == [5.0] * 4


def come_again(plans: Planner, tensors: Model, buffers: StagingBuffers) -> None:
    """The very same objects, until they are no longer looked at one by one."""
    for _ in range(2):
        staged(plans, tensors, buffers)
    assert whole(plans, tensors).looked is whole(plans, tensors).looked


def turned(tensors: Model) -> None:
    tensors["odd"].t_()


def turned_in_its_square(tensors: Model) -> None:
    tensors["l.q_a_proj.weight"][0, 1] = 7.0
    tensors["l.q_a_proj.weight"].t_()


def seen_as_another_dtype(tensors: Model) -> None:
    tensors["part"].data = tensors["part"].data.view(torch.int32)


def seen_in_another_shape(tensors: Model) -> None:
    tensors["part"].data = tensors["part"].data.view(2, 3)


def seen_in_part(tensors: Model) -> None:
    tensors["part"].data = tensors["part"].data[:2]


def replaced(tensors: Model) -> None:
    tensors["odd"] = tensors["odd"] + 1.0


def renamed(tensors: Model) -> None:
    tensors["other"] = tensors.pop("empty")


@pytest.mark.parametrize(
    "change",
    [
        turned,
        turned_in_its_square,
        seen_as_another_dtype,
        seen_in_another_shape,
        seen_in_part,
        replaced,
        renamed,
        dict.popitem,
    ],
)
def test_the_very_same_objects_are_taken_for_what_they_are_by_now(
    buffers: StagingBuffers, change: Callable[[Model], object]
) -> None:
    plans, tensors = planner(), model()
    come_again(plans, tensors, buffers)
    change(tensors)
    assert whole(plans, tensors).plan == whole(planner(), tensors).plan
    assert_equal(staged(plans, tensors, buffers), tensors)


def test_the_very_same_objects_are_refused_once_their_memory_is_gone(buffers: StagingBuffers) -> None:
    plans, tensors = planner(), model()
    come_again(plans, tensors, buffers)
    freed(tensors)
    with pytest.raises(ValueError, match="tensor odd was freed"):
        whole(plans, tensors).staged(buffers, CPU)


def test_new_objects_each_time_are_looked_at_each_time() -> None:
    plans, models = planner(), [model() for _ in range(3)]
    looked = [whole(plans, tensors).looked for tensors in models]
    assert len({id(one) for one in looked}) == 3


def test_a_trainer_may_swap_the_tensors_that_it_has_sent(buffers: StagingBuffers) -> None:
    plans, tensors = planner(), model()
    come_again(plans, tensors, buffers)
    torch.utils.swap_tensors(tensors["odd"], torch.full((5, 3), 9.0))  # type: ignore[no-untyped-call]
    assert_equal(staged(plans, tensors, buffers), tensors)


def test_a_sparse_tensor_is_refused_in_the_same_words_however_often(buffers: StagingBuffers) -> None:
    plans, tensors = planner(), {**model(), "part": torch.eye(4).to_sparse(), "last": torch.ones(2)}
    for _ in range(3):
        with pytest.raises(ValueError, match=r"tensor part has the layout torch\.sparse_coo"):
            plans.outgoing(tensors.items(), None).staged(buffers, CPU)


def test_two_models_in_turn_keep_their_plans(buffers: StagingBuffers) -> None:
    plans, one, other = planner(), model(), {"w": torch.ones(8)}
    seen = [whole(plans, tensors).planned for tensors in (one, other, one, other)]
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    for tensors in (one, other, one):
        assert_equal(staged(plans, tensors, buffers), tensors)


def freed(tensors: Model) -> Model:
    tensors["odd"].untyped_storage().resize_(0)
    return tensors


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (freed, "tensor odd was freed"),
        (lambda t: {**t, "odd": t["odd"].to("meta")}, "tensor odd is on the meta device"),
        (lambda t: {**t, "odd": t["odd"].to_sparse()}, "tensor odd has the layout torch.sparse_coo"),
    ],
    ids=["freed", "meta", "sparse"],
)
def test_tensors_that_come_again_are_checked_again(
    buffers: StagingBuffers, spoil: Callable[[Model], Model], words: str
) -> None:
    plans = planner()
    staged(plans, model(), buffers)
    with pytest.raises(ValueError, match=re.escape(words)):
        plans.outgoing(spoil(model()).items(), None).staged(buffers, CPU)


def test_values_of_tensors_that_come_again_are_looked_at_again() -> None:
    plans, tensors = planner(), model()
    whole(plans, tensors).check_values()
    tensors["odd"][1, 1] = float("inf")
    with pytest.raises(ValueError, match="tensor odd holds NaN or infinity"):
        whole(plans, tensors).check_values()


class Marked(torch.Tensor):
    """A subclass may mean something else than it says."""


@pytest.mark.parametrize("value", [PlainTensor(torch.ones(2)), torch.ones(2).as_subclass(Marked)], ids=["lazy", "kind"])
def test_anything_but_whole_tensors_goes_the_general_way(buffers: StagingBuffers, value: Sendable) -> None:
    pairs: list[tuple[str, Sendable]] = [("w", torch.ones(2)), ("v", value)]
    cargo = planner().outgoing(pairs, None)
    assert not isinstance(cargo, WholeTensors)
    assert isinstance(cargo.staged(buffers, CPU), StagedBuckets)


def test_a_name_that_comes_twice_is_refused_however_often() -> None:
    plans = planner()
    for _ in range(2):
        with pytest.raises(ValueError, match="the name w comes 2 times"):
            plans.outgoing([("w", torch.ones(1)), ("w", torch.ones(1))], None)


def test_what_is_remembered_keeps_no_tensor(buffers: StagingBuffers) -> None:
    plans, tensors = planner(), model()
    come_again(plans, tensors, buffers)
    gone = [weakref.ref(tensor) for tensor in tensors.values()]
    tensors.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_places_in_a_buffer_are_made_once_for_a_plan_and_go_with_the_buffer() -> None:
    plans, buffers = planner(), StagingBuffers(2)
    for _ in range(2):
        staged(plans, model(), buffers)
    plan = whole(plans, model()).plan
    first = buffers.views(plan, 0)
    staged(plans, model(), buffers)
    assert buffers.views(plan, 0) is first
    memory = weakref.ref(first[0].untyped_storage())
    del first
    buffers.release()
    gc.collect()
    assert memory() is None


def test_a_buffer_that_had_to_grow_has_new_places() -> None:
    plans, buffers = planner(1 << 20), StagingBuffers(1)
    small, large = {"w": torch.ones(4)}, {"w": torch.ones(4000)}
    for tensors in (small, large, small, large):
        assert_equal(staged(plans, tensors, buffers), tensors)
    buffers.release()


def test_the_buckets_of_whole_tensors_need_no_gather(buffers: StagingBuffers) -> None:
    cargo = whole(planner(), model())
    buckets = cargo.staged(buffers, CPU)
    assert isinstance(buckets, CopiedBuckets)
    buckets.forgo()
    cargo.forgo(CPU)
    assert cargo.memory(buffers, CPU).gather == 0
