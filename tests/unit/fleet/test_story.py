"""What several tries come to, engine by engine."""

from __future__ import annotations

import pickle

from google.protobuf.duration_pb2 import Duration

from adapter.errors import EngineUnreachable, SidecarUnreachable, UpdateAborted, UpdateFailed, UpdateRefused
from adapter.fleet import EngineResult, EngineState, FleetUpdateFailed
from adapter.fleet.attempt import Try
from adapter.fleet.story import Story
from sidecar.v1 import weight_sync_pb2 as pb
from tests.unit.fleet.conftest import Three

HIT = "Failed to receive weights: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"


def states(story: Story) -> dict[str, EngineState]:
    return {target: engine.state for target, engine in story.results().items()}


def test_every_kind_of_failure_has_its_state(three: Three) -> None:
    a, b, c = three
    failed = {a: SidecarUnreachable("gone"), b: EngineUnreachable("gone"), c: UpdateRefused("no")}
    assert list(states(Story({**failed})).values()) == [
        EngineState.UNREACHABLE,
        EngineState.UNREACHABLE,
        EngineState.UNTOUCHED,
    ]
    story = Story({})
    story.add(Try(failed={a: UpdateFailed("half")}, untouched={b}, published={c: pb.UpdateOutcome()}))
    assert list(states(story).values()) == [EngineState.DIRTY, EngineState.UNTOUCHED, EngineState.PUBLISHED]
    assert [engine.error for engine in story.results().values()] == ["half", "", ""]


def test_decided_once_is_decided(three: Three) -> None:
    a, b, _ = three
    story = Story({})
    assert not story.decided
    story.add(Try(published={a: pb.UpdateOutcome()}))
    story.add(Try(failed={b: UpdateFailed("half")}))
    assert (story.decided, story.attempts) == (True, 2)


def test_the_last_try_of_an_engine_counts(three: Three) -> None:
    a, b, c = three
    story = Story({})
    story.add(Try(failed={a: UpdateFailed(HIT), b: UpdateFailed("to blame")}, untouched={c}))
    story.add(Try(published={a: pb.UpdateOutcome()}, failed={c: UpdateAborted("restarted")}))
    assert states(story) == {"a:1": EngineState.PUBLISHED, "b:1": EngineState.DIRTY, "c:1": EngineState.UNTOUCHED}
    assert story.results()["a:1"].error == ""


def test_an_engine_that_is_dirty_is_not_made_clean_by_being_let_go(three: Three) -> None:
    a, _, _ = three
    story = Story({})
    story.add(Try(failed={a: UpdateFailed(HIT)}))
    story.add(Try(untouched={a}))
    assert states(story) == {"a:1": EngineState.DIRTY}


def test_an_engine_that_is_dirty_is_not_made_clean_by_a_try_that_does_not_touch_it(three: Three) -> None:
    a, _, _ = three
    story = Story({})
    story.add(Try(failed={a: UpdateFailed(HIT)}))
    story.add(Try(failed={a: UpdateRefused("no such group")}))
    assert states(story) == {"a:1": EngineState.DIRTY}
    story.add(Try(published={a: pb.UpdateOutcome()}))
    assert states(story) == {"a:1": EngineState.PUBLISHED}


def test_whoever_was_let_go_or_hit_by_another_is_worth_another_try(three: Three) -> None:
    a, b, c = three
    story = Story({})
    story.add(Try(failed={a: UpdateFailed(HIT), b: UpdateFailed("no such tensor")}, untouched={c}))
    assert story.worth_another_try(three) == [a, c]
    assert story.worth_another_try([b, c]) == [c]
    story.add(Try(published={a: pb.UpdateOutcome()}, failed={c: SidecarUnreachable(HIT)}))
    assert story.worth_another_try(three) == []


def test_who_is_gone_before_the_next_try_is_unreachable_and_a_dirty_engine_stays_dirty(three: Three) -> None:
    a, b, c = three
    story = Story({})
    story.add(Try(failed={a: UpdateFailed(HIT)}, untouched={b, c}))
    gone = EngineUnreachable("no answer")
    story.lost({a: gone, b: gone})
    assert states(story) == {"a:1": EngineState.DIRTY, "b:1": EngineState.UNREACHABLE, "c:1": EngineState.UNTOUCHED}
    assert story.results()["b:1"].error == "no answer"


def test_the_slowest_is_the_one_that_one_step_took_longest_over_all_tries(three: Three) -> None:
    a, b, _ = three
    story = Story({})
    assert story.slowest() == ""
    story.add(Try(seconds={"begin": 1.0}, waited={"begin": {a: 1.0, b: 0.6}}))
    story.add(Try(seconds={"begin": 0.5, "load": 0.2}, waited={"begin": {b: 0.5}, "load": {a: 0.2}}))
    assert story.slowest() == "b:1 (begin: 1.100 s)"
    assert story.seconds == {"begin": 1.5, "load": 0.2}


def test_an_engines_own_phases_are_told_in_seconds(three: Three) -> None:
    a, _, _ = three
    phase = pb.PhaseDuration(phase=pb.PHASE_LOAD, duration=Duration(seconds=1, nanos=500_000_000))
    story = Story({})
    story.add(Try(published={a: pb.UpdateOutcome(phases=[phase])}))
    update = story.results()["a:1"].update
    assert update is not None
    assert update.phases == {"load": 1.5}


def test_the_failure_of_a_fleet_survives_being_sent_to_another_process() -> None:
    engine = EngineResult(target="a:1", state=EngineState.DIRTY, error="half")
    failed = FleetUpdateFailed("too few", {"a:1": engine}, {"a:1": UpdateFailed("half", reason="UPDATE_FAILED")})
    again = pickle.loads(pickle.dumps(failed))
    assert (type(again), str(again), again.engines) == (FleetUpdateFailed, "too few", {"a:1": engine})
    assert (type(again.errors["a:1"]), again.errors["a:1"].reason) == (UpdateFailed, "UPDATE_FAILED")
