"""Which models are replayed, which are not and why, and that all of them hold what their own load gives."""

from typing import Any

import pytest
import torch

from adapter.lease import Lease
from adapter.replay.kept import KeptRegions
from adapter.replay.replayer import Replayer
from adapter.replay.verdict import Outcome
from tests.unit.replay import models
from tests.unit.replay.calls import assert_loaded, bucket, digest, serve
from tests.unit.replay.models import Model

PROVEN_IN_THREE = [Outcome.RECORDED, Outcome.PROVEN, Outcome.REPLAYED]


def outcomes(model: Model, num: int = 3, **more: Any) -> list[Outcome]:
    """Of that many updates, each with bytes of its own, and each looked at afterwards."""
    replayer, seen = Replayer(KeptRegions()), []
    for seed in range(num):
        flat = bucket(seed)
        outcome, _ = serve(replayer, model, flat, **more)
        seen.append(outcome)
        assert_loaded(model, flat)
    return seen


@pytest.mark.parametrize("kind", models.REPLAYED)
def test_copies_are_recorded_then_proven_then_replayed(kind: type[Model]) -> None:
    assert outcomes(kind(), 4) == [*PROVEN_IN_THREE, Outcome.REPLAYED]


@pytest.mark.parametrize("kind", models.REFUSED)
def test_whatever_is_more_than_copies_is_left_to_the_model(kind: type[Model]) -> None:
    model, replayer = kind(), Replayer(KeptRegions())
    for seed in range(3):
        flat = bucket(seed)
        outcome, why = serve(replayer, model, flat)
        assert outcome is Outcome.FELL_BACK
        assert models.REFUSED[kind] in why
        assert_loaded(model, flat)


def test_a_step_that_no_recording_shows_is_found_by_the_first_replay() -> None:
    model, replayer = models.DerivingInAThread(), Replayer(KeptRegions())
    seen = []
    for seed in range(3):
        flat = bucket(seed)
        seen.append(serve(replayer, model, flat))
        assert_loaded(model, flat)
    assert [outcome for outcome, _ in seen] == [Outcome.RECORDED, Outcome.FELL_BACK, Outcome.FELL_BACK]
    assert "derives more from its weights, unseen" in seen[-1][1]


def test_a_step_that_no_recording_shows_is_found_where_its_weights_stay_the_same_too() -> None:
    """A frozen layer: what is derived of it is there already."""
    model, replayer, first = models.DerivingInAThread(), Replayer(KeptRegions()), bucket(1)
    second = torch.cat([first[:192], bucket(2)[192:]])  # the norm alone is another one
    serve(replayer, model, first)
    assert serve(replayer, model, second)[0] is Outcome.FELL_BACK
    assert_loaded(model, second)


def test_a_proof_leaves_what_is_not_loaded_as_it_was() -> None:
    model, replayer = Model(), Replayer(KeptRegions())
    for seed in range(3):
        serve(replayer, model, bucket(seed))
    assert model.cos.tolist() == [1.0, 1.0, 1.0]  # type: ignore[operator]


def test_a_model_whose_tensors_have_another_form_is_recorded_anew() -> None:
    model, replayer = Model(), Replayer(KeptRegions())
    for seed in range(3):
        serve(replayer, model, bucket(seed))
    model.qk.data = model.qk.data.as_strided((8, 6), (1, 8))
    assert serve(replayer, model, bucket(3))[0] is Outcome.RECORDED


def test_a_region_that_the_model_holds_on_to_is_not_kept_under_its_lease() -> None:
    lease, replayer = Lease(), Replayer(KeptRegions(worth_keeping=lambda _: True))
    assert serve(replayer, models.Keeping(), bucket(1), lease=lease.name)[0] is Outcome.FELL_BACK
    assert not lease.is_kept()


def test_what_a_model_leaves_out_is_explained_by_shards() -> None:
    assert outcomes(models.Sharding(), ranks=[2, 1]) == PROVEN_IN_THREE
    assert outcomes(models.Sharding(), ranks=[1, 1])[0] is Outcome.FELL_BACK


def test_a_name_that_may_be_skipped_may_be_left_out() -> None:
    assert outcomes(models.Skipping(), skippable=["k"]) == PROVEN_IN_THREE


def test_the_same_bytes_again_prove_nothing() -> None:
    model, replayer = Model(), Replayer(KeptRegions())
    seen = [serve(replayer, model, bucket(seed)) for seed in (1, 1, 1, 2, 3)]
    assert [outcome for outcome, _ in seen] == [
        Outcome.RECORDED,
        Outcome.RECORDED,
        Outcome.RECORDED,
        Outcome.PROVEN,
        Outcome.REPLAYED,
    ]
    assert "proves nothing" in seen[1][1]


def test_a_model_whose_memory_has_moved_is_recorded_anew() -> None:
    model, replayer = models.Moving(), Replayer(KeptRegions())
    for seed in range(3):
        serve(replayer, model, bucket(seed))
    model.move()
    seen = []
    for seed in range(3, 6):
        seen.append(serve(replayer, model, bucket(seed), in_full=False)[0])
        assert_loaded(model, bucket(seed))
    assert seen == PROVEN_IN_THREE


def test_an_unknown_manifest_is_an_answer_and_its_bucket_is_held_for_one_call() -> None:
    model, replayer, flat, empty = Model(), Replayer(KeptRegions()), bucket(1), torch.empty(0)
    assert serve(replayer, model, flat, in_full=False)[0] is Outcome.UNKNOWN
    assert serve(replayer, model, empty, "load_held")[0] is Outcome.RECORDED
    assert_loaded(model, flat)
    assert serve(replayer, model, empty, "load_held")[0] is Outcome.UNKNOWN


def test_memory_that_is_not_mapped_is_an_answer() -> None:
    outcome, why = serve(Replayer(KeptRegions()), Model(), torch.empty(0), lease="sglang-weight-sync-lease-" + "1" * 32)
    assert outcome is Outcome.UNKNOWN
    assert "not mapped" in why


@pytest.mark.parametrize("ask", ["hello", "nothing"])
def test_a_greeting_loads_nothing(ask: str) -> None:
    model = Model()
    assert serve(Replayer(KeptRegions()), model, torch.empty(0), ask, in_full=False)[0] is Outcome.READY
    assert not model.qk.any()


def test_the_oldest_plan_goes_when_there_are_too_many() -> None:
    model, flat, replayer = Model(), bucket(1), Replayer(KeptRegions(), most_plans=2)
    serve(replayer, model, flat)
    for size in (512, 768):
        serve(replayer, model, torch.cat([flat] * 3), size=size, digest=digest(size))
    assert serve(replayer, model, flat, in_full=False)[0] is Outcome.UNKNOWN


def test_a_bucket_that_lies_further_on_in_its_memory_is_read_where_it_lies() -> None:
    model, replayer = Model(), Replayer(KeptRegions())
    for seed in range(3):
        whole = torch.cat([torch.zeros(64, dtype=torch.uint8), bucket(seed)])
        outcome, _ = serve(replayer, model, whole[64:])
        assert_loaded(model, bucket(seed))
    assert outcome is Outcome.REPLAYED


def test_buckets_of_several_sizes_come_from_one_region_that_is_kept() -> None:
    model, lease, replayer = Model(), Lease(), Replayer(KeptRegions(worth_keeping=lambda _: True))
    region = torch.cat([bucket(1)] * 2)
    serve(replayer, model, region[:256], lease=lease.name)
    for seed in (2, 3, 4):
        region.copy_(torch.cat([bucket(seed)] * 2))
        outcome, _ = serve(replayer, model, torch.empty(0), size=512, digest=digest(512), lease=lease.name)
        assert_loaded(model, bucket(seed))
    assert outcome is Outcome.REPLAYED
    assert serve(replayer, model, torch.empty(0), size=768, digest=digest(768), lease=lease.name)[0] is Outcome.UNKNOWN
    assert lease.end(5)
