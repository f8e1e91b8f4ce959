"""Three engines that take one version, or not: by policy, by fault, by what they did before."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from adapter.fleet import ALL_OR_NOTHING, BEST_EFFORT, Asked, EngineState, Fleet, FleetUpdateFailed, Policy, quorum
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import FOREVER, Fault
from tests.faults.wires import Wire
from tests.integration.fleets import LET_GO, WEIGHTS, WHOLE_UPDATE, Named, NeverWhole, Trio, restart, states, update
from tests.integration.groups import BEGIN, INIT, PAUSE, PUBLISH, RECEIVE, RESUME
from tests.integration.support import wait_until

PUBLISHED, UNTOUCHED, DIRTY, UNREACHABLE = EngineState
READY, FENCED = pb.SIDECAR_STATE_READY, pb.SIDECAR_STATE_FENCED
NOBODY = "unix:/nowhere/sidecar.sock"


# Everybody is there.


def test_all_engines_serve_one_version_and_each_was_asked_in_order(trio: Trio) -> None:
    with trio.fleet() as fleet:
        result = update(fleet, trio.v(1))
        assert fleet.version == result.weight_version == trio.v(1)
        assert (result.published, result.left_behind, result.attempts) == (sorted(trio.targets), [], 1)
        assert trio.versions == [trio.v(1)] * 3
        assert trio.sidecars() == [(trio.v(1), READY)] * 3
        assert trio.posts() == [WHOLE_UPDATE] * 3
        assert (result.num_buckets, result.num_bytes) == (2, 48)
        assert list(result.seconds) == ["begin", "prepare", "broadcast", "publish", "join"]
        for engine in result.engines.values():
            assert engine.update is not None
            assert (engine.update.weight_version, engine.update.num_posts) == (trio.v(1), result.num_buckets)
            assert "load" in engine.update.phases
        assert any(result.slowest.startswith(target) for target in trio.targets)
    assert trio.fenced == {}
    assert [pair.engine.groups for pair in trio.pairs] == [[], [], []]


def test_one_group_has_the_ranks_of_all_engines_and_serves_many_updates(trio: Trio) -> None:
    with trio.fleet() as fleet:
        for number in (1, 2, 3):
            update(fleet, trio.v(number))
        ((name, world_size),) = Named.made
        assert world_size == 1 + 1 + 2 + 1
        assert [pair.engine.groups for pair in trio.pairs] == [[name]] * 3
        assert [pair.bodies(INIT)[0]["rank_offset"] for pair in trio.pairs] == [1, 2, 4]


def test_no_engine_publishes_before_all_hold_the_update(trio: Trio) -> None:
    with trio.fleet() as fleet:
        trio.pairs[2].engine.fault(RECEIVE, Fault.LATE, after=1, delay_s=1.0)
        update(fleet, trio.v(1))
    published = [next(call.at for call in reversed(p.engine.calls) if call.path == PUBLISH) for p in trio.pairs]
    late = [call.at for call in trio.pairs[2].engine.calls if call.path == RECEIVE][-1]
    assert min(published) > late + 1.0


def test_an_engine_whose_answer_was_lost_has_published_all_the_same(trio: Trio, tmp_path: Path) -> None:
    pair = trio.pairs[0]
    with closing(Wire(tmp_path / "wire.sock", Path(pair.target.removeprefix("unix:")))) as wire:
        through_wire = f"unix:{wire.path}"
        with trio.fleet([through_wire, *trio.targets[1:]]) as fleet, ThreadPoolExecutor(1) as thread:
            pair.engine.fault(RESUME, Fault.HANG)
            updating = thread.submit(update, fleet, trio.v(1))
            wait_until(lambda: pair.engine.num_hanging == 1)
            wire.cut()
            pair.engine.release()
            assert states(updating.result(), [through_wire, *trio.targets[1:]]) == [PUBLISHED] * 3
    assert trio.fenced == {}
    assert trio.sidecars() == [(trio.v(1), READY)] * 3


def test_an_engine_that_was_restarted_makes_a_new_group(trio: Trio) -> None:
    with trio.fleet() as fleet:
        update(fleet, trio.v(1))
        restart(trio.pairs[0])
        assert update(fleet, trio.v(2)).published == sorted(trio.targets)
        assert len(set(Named.made)) == 2
        assert trio.versions == [trio.v(2)] * 3


def test_an_engine_that_is_discovered_later_is_a_member_from_then_on(trio: Trio) -> None:
    found = trio.targets[:2]
    with trio.fleet(Asked(lambda: found)) as fleet:
        assert update(fleet, trio.v(1)).published == sorted(trio.targets[:2])
        found.append(trio.targets[2])
        assert set(fleet.status()) == set(trio.targets)
        caught_up = fleet.catch_up(WEIGHTS)
        assert caught_up is not None
        assert caught_up.published == [trio.targets[2]]
        assert trio.versions == [trio.v(1)] * 3
        del found[0]
        assert update(fleet, trio.v(2)).published == sorted(trio.targets[1:])
        assert trio.versions == [trio.v(1), trio.v(2), trio.v(2)]


def test_a_fleet_without_a_member_says_so() -> None:
    with Fleet(Asked(list), make_group=Named) as fleet:
        with pytest.raises(FleetUpdateFailed, match="version '1' was not published: the fleet has no member") as failed:
            update(fleet, "1")
        assert (failed.value.engines, fleet.version, fleet.status()) == ({}, "", {})


# Somebody fails before anything is written.


def test_who_is_on_the_way_to_a_group_that_another_one_refused_is_turned_away_until_it_has_come(trio: Trio) -> None:
    trio.pairs[0].engine.fault(INIT, Fault.LATE, delay_s=1.0)
    trio.pairs[1].engine.fault(INIT, Fault.REFUSE)
    with trio.fleet(policy=quorum(2), make_group=NeverWhole) as fleet:
        result = update(fleet, trio.v(1))
    assert (result.attempts, result.left_behind) == (2, [trio.targets[1]])
    (given_up, went_on) = Named.made
    ((name, over_at_once, over),) = Named.turned_away
    assert (name, over_at_once, over()) == (given_up[0], False, True)
    assert went_on[0] != given_up[0]


@pytest.mark.parametrize("path", [PAUSE, BEGIN])
def test_an_engine_that_cannot_make_ready_leaves_all_untouched_with_all_or_nothing(trio: Trio, path: str) -> None:
    trio.pairs[1].engine.fault(path, Fault.REFUSE)
    with trio.fleet() as fleet, pytest.raises(FleetUpdateFailed, match=r"all-or-nothing: 0 of 3 engines") as failed:
        update(fleet, trio.v(1))
    assert states(failed.value, trio.targets)[::2] == [UNTOUCHED, UNTOUCHED]
    assert set(failed.value.errors) == {trio.targets[1]}
    assert trio.versions == [trio.v(0)] * 3
    assert trio.sidecars() == [(trio.v(0), READY)] * 3
    assert [trio.posts()[0], trio.posts()[2]] == [LET_GO, LET_GO]
    assert not any(pair.is_paused() for pair in trio.pairs)


def test_a_late_member_is_dropped_and_the_others_are_tried_again_without_it(trio: Trio) -> None:
    with trio.fleet(policy=quorum(2), patience=4.0) as fleet:
        trio.pairs[1].engine.fault(PAUSE, Fault.LATE, delay_s=8.0)
        result = update(fleet, trio.v(1))
    others = [trio.targets[0], trio.targets[2]]
    assert (result.published, result.attempts) == (sorted(others), 2)
    assert trio.versions == [trio.v(1), trio.v(0), trio.v(1)]
    assert trio.posts()[0] == trio.posts()[2] == [*LET_GO, *WHOLE_UPDATE]
    assert list(trio.fenced) == [trio.targets[1]]
    assert result.engines[trio.targets[1]].fenced
    assert result.engines[trio.targets[1]].state is UNTOUCHED
    assert trio.sidecars()[1] == (trio.v(0), FENCED)
    assert trio.pairs[1].is_paused()


@pytest.mark.parametrize("pause", [True, False])
def test_a_fenced_engine_is_out_of_service_until_it_is_caught_up(trio: Trio, pause: bool) -> None:
    with trio.fleet(policy=quorum(2), pause_fenced=pause) as fleet:
        trio.pairs[1].engine.fault(PAUSE, Fault.REFUSE)
        result = update(fleet, trio.v(1))
        assert states(result, trio.targets) == [PUBLISHED, result.engines[trio.targets[1]].state, PUBLISHED]
        assert (result.left_behind, list(trio.fenced)) == ([trio.targets[1]], [trio.targets[1]])
        assert trio.sidecars()[1] == (trio.v(0), FENCED)
        assert trio.pairs[1].is_paused() == pause
        assert f"the fleet serves {trio.v(1)!r}, this engine does not" in trio.pairs[1].status().reason
        trio.mark()
        caught_up = fleet.catch_up(WEIGHTS)
        assert caught_up is not None
        assert caught_up.published == [trio.targets[1]]
        assert [trio.posts()[0], trio.posts()[2]] == [[], []]
        assert trio.sidecars() == [(trio.v(1), READY)] * 3
        assert not trio.pairs[1].is_paused()
        assert fleet.catch_up(WEIGHTS) is None


@pytest.mark.parametrize("policy", [quorum(3), BEST_EFFORT], ids=str)
def test_a_sidecar_that_is_not_there_is_left_out_where_the_policy_can(trio: Trio, policy: Policy) -> None:
    with trio.fleet([*trio.targets, NOBODY], policy=policy) as fleet:
        result = update(fleet, trio.v(1))
    assert (result.published, result.left_behind) == (sorted(trio.targets), [NOBODY])
    assert result.engines[NOBODY].state is UNREACHABLE
    assert "cannot be reached" in trio.fenced[NOBODY]
    assert result.attempts == 1


@pytest.mark.parametrize("policy", [ALL_OR_NOTHING, quorum(4)], ids=str)
def test_a_sidecar_that_is_not_there_ends_the_update_before_anybody_is_asked(trio: Trio, policy: Policy) -> None:
    with trio.fleet([*trio.targets, NOBODY], policy=policy) as fleet, pytest.raises(FleetUpdateFailed) as failed:
        update(fleet, trio.v(1))
    assert states(failed.value, [*trio.targets, NOBODY]) == [UNTOUCHED, UNTOUCHED, UNTOUCHED, UNREACHABLE]
    assert "cannot be reached" in str(failed.value)
    assert trio.posts() == [[], [], []]


def test_a_quorum_that_is_larger_than_the_fleet_says_so_and_names_every_engine(trio: Trio) -> None:
    words = "quorum of 5: 0 of 5 engines took it"
    with trio.fleet(policy=quorum(5)) as fleet, pytest.raises(FleetUpdateFailed, match=words) as failed:
        update(fleet, trio.v(1))
    assert states(failed.value, trio.targets) == [UNTOUCHED] * 3
    assert trio.posts() == [[], [], []]


def test_best_effort_goes_on_without_an_engine_that_died(trio: Trio) -> None:
    with trio.fleet(policy=BEST_EFFORT) as fleet:
        update(fleet, trio.v(1))
        trio.pairs[0].engine.die()
        result = update(fleet, trio.v(2))
        assert result.published == sorted(trio.targets[1:])
        assert list(trio.fenced) == [trio.targets[0]]
        assert trio.versions[1:] == [trio.v(2), trio.v(2)]
        restart(trio.pairs[0])
        caught_up = fleet.catch_up(WEIGHTS)
        assert caught_up is not None
        assert caught_up.published == [trio.targets[0]]
    assert trio.versions == [trio.v(2)] * 3


# Somebody fails once it is being written.


def test_a_load_that_is_refused_leaves_no_engine_with_the_version_and_those_that_held_it_dirty(trio: Trio) -> None:
    with trio.fleet() as fleet:
        trio.pairs[1].engine.fault(RECEIVE, Fault.REFUSE, after=1)
        with pytest.raises(FleetUpdateFailed) as failed:
            update(fleet, trio.v(1))
        assert states(failed.value, trio.targets) == [DIRTY] * 3
        assert "was refused by a test" in failed.value.engines[trio.targets[1]].error
        assert "it holds the update, which was not published" in failed.value.engines[trio.targets[0]].error
        assert (fleet.version, trio.fenced) == ("", {})
        assert trio.v(1) not in trio.versions
        assert trio.sidecars() == [("", pb.SIDECAR_STATE_DIRTY)] * 3
        assert all(pair.is_paused() for pair in trio.pairs)
        assert not any(PUBLISH in posts or RESUME in posts for posts in trio.posts())
        assert update(fleet, trio.v(2)).published == sorted(trio.targets)
    assert trio.sidecars() == [(trio.v(2), READY)] * 3
    assert trio.versions == [trio.v(2)] * 3
    assert not any(pair.is_paused() for pair in trio.pairs)


def test_the_version_that_a_dirty_engine_missed_is_brought_to_it_by_catching_up(trio: Trio) -> None:
    with trio.fleet(policy=quorum(2)) as fleet:
        trio.pairs[1].engine.fault(RECEIVE, Fault.REFUSE, after=1)
        result = update(fleet, trio.v(1))
        assert states(result, trio.targets) == [PUBLISHED, DIRTY, PUBLISHED]
        assert list(trio.fenced) == [trio.targets[1]]
        assert trio.sidecars()[1] == ("", pb.SIDECAR_STATE_DIRTY)
        caught_up = fleet.catch_up(WEIGHTS)
        assert caught_up is not None
        assert (caught_up.published, caught_up.weight_version) == ([trio.targets[1]], trio.v(1))
    assert trio.sidecars() == [(trio.v(1), READY)] * 3


def test_the_version_that_dirty_engines_had_is_brought_to_them_again(trio: Trio) -> None:
    with trio.fleet() as fleet:
        update(fleet, trio.v(1))
        trio.pairs[1].engine.fault(RECEIVE, Fault.REFUSE)
        with pytest.raises(FleetUpdateFailed):
            update(fleet, trio.v(2))
        assert fleet.version == trio.v(1)
        caught_up = fleet.catch_up(WEIGHTS)
        assert caught_up is not None
        assert caught_up.published == sorted(trio.targets)
    assert trio.sidecars() == [(trio.v(1), READY)] * 3


def test_a_trainer_that_was_started_again_brings_the_version_that_its_predecessor_could_not(trio: Trio) -> None:
    trio.pairs[1].engine.fault(RECEIVE, Fault.REFUSE)
    with trio.fleet() as fleet, pytest.raises(FleetUpdateFailed):
        update(fleet, trio.v(1))
    with trio.fleet() as again:
        assert update(again, trio.v(1)).published == sorted(trio.targets)
    assert trio.sidecars() == [(trio.v(1), READY)] * 3


@pytest.mark.parametrize("policy", [ALL_OR_NOTHING, quorum(3), BEST_EFFORT], ids=str)
def test_what_is_decided_is_published_whoever_fails_to(trio: Trio, policy: Policy) -> None:
    with trio.fleet(policy=policy) as fleet:
        trio.pairs[1].engine.fault(PUBLISH, Fault.REFUSE, times=FOREVER)
        result = update(fleet, trio.v(1))
        assert fleet.version == trio.v(1)
        assert result.published == sorted([trio.targets[0], trio.targets[2]])
        assert result.left_behind == list(trio.fenced) == [trio.targets[1]]
        assert result.engines[trio.targets[1]].error
        assert trio.versions == [trio.v(1), trio.v(0), trio.v(1)]
        assert trio.sidecars()[1][1] != READY
        trio.pairs[1].engine.forget_faults()
        caught_up = fleet.catch_up(WEIGHTS)
        assert caught_up is not None
        assert caught_up.published == [trio.targets[1]]
    assert trio.sidecars() == [(trio.v(1), READY)] * 3


# What cannot be sent.


@pytest.mark.parametrize(
    ("version", "update_id", "problem"),
    [
        ("v" * 129, "id", "weight_version must be"),
        ("7", "i" * 129, "update_id must be"),
        ("7\n", "id", "weight_version must be"),
    ],
)
def test_names_that_are_too_long_or_cannot_be_printed_leave_every_engine_untouched(
    trio: Trio, version: str, update_id: str, problem: str
) -> None:
    with trio.fleet(policy=BEST_EFFORT) as fleet, pytest.raises(FleetUpdateFailed, match=problem) as failed:
        fleet.update_weights(WEIGHTS, version=version, update_id=update_id)
    assert states(failed.value, trio.targets) == [UNTOUCHED] * 3
    assert trio.posts() == [[], [], []]
    assert trio.sidecars() == [(trio.v(0), READY)] * 3


def test_a_version_of_the_longest_kind_and_an_id_that_comes_again_for_another_try_have_room(trio: Trio) -> None:
    alike = f"{trio.v(1)} {'é' * 128}"[:127]
    with trio.fleet(policy=quorum(2)) as fleet:
        for letter in "ab":
            trio.pairs[1].engine.fault(PAUSE, Fault.REFUSE)
            assert update(fleet, alike + letter).attempts == 2
            assert fleet.catch_up(WEIGHTS) is not None
            assert trio.versions == [alike + letter] * 3
        for letter in "cd":
            trio.pairs[1].engine.fault(PAUSE, Fault.REFUSE)
            result = fleet.update_weights(WEIGHTS, version=f"{trio.v(2)}{letter}", update_id=alike + letter)
            assert (result.attempts, result.left_behind) == (2, [trio.targets[1]])


def test_to_catch_up_with_nothing_is_a_mistake(trio: Trio) -> None:
    with trio.fleet() as fleet, pytest.raises(ValueError, match="the fleet has published nothing yet"):
        fleet.catch_up(WEIGHTS)


def test_nothing_is_waited_for_longer_than_the_whole_may_take(trio: Trio) -> None:
    trio.pairs[1].engine.fault(RECEIVE, Fault.LATE, delay_s=6.0)
    began = time.monotonic()
    with trio.fleet() as fleet, pytest.raises(FleetUpdateFailed):
        fleet.update_weights(WEIGHTS, version=trio.v(1), timeout=1.5)
    assert time.monotonic() - began < 20.0
    assert trio.v(1) not in trio.versions
