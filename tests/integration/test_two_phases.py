"""Updates in two phases, from memory and over a group: nothing is served before the word to publish, nor after none."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.groups import (
    PUBLISH,
    RESUME,
    Committing,
    abort,
    assert_dirty,
    begin,
    decided_on,
    ended,
    hold,
    made_ready,
    prepare,
    publish,
    ready,
    received,
    whole_update,
)
from tests.integration.support import (
    ANSWER_S,
    LOAD,
    NO_SESSIONS,
    SESSIONS,
    Pair,
    expected_posts,
    failed_call,
    manifest,
    refusal,
    wait_until,
)

both_kinds = pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)
AT_ONCE_S = 10.0


def begin_both(pair: Pair, update_id: str, num_buckets: int = 1, **changes: object) -> None:
    """Two ranks, which send memory."""
    for rank in range(2):
        fields: dict[str, object] = {"group_name": "", "two_phase": True} | changes
        whole = manifest(num_buckets)
        begin(pair, update_id, rank, tp_size=2, manifest=whole, **fields).result(ANSWER_S)  # type: ignore[arg-type]


def push_both(pair: Pair, update_id: str, num_buckets: int = 1) -> None:
    for pushed in [pair.push(update_id, rank, bucket) for bucket in range(num_buckets) for rank in range(2)]:
        pushed.result(ANSWER_S)


def commit_both(pair: Pair, update_id: str) -> list[Committing]:
    return [pair.commit(update_id, rank) for rank in range(2)]


def decided_on_from_memory(pair: Pair, update_id: str) -> None:
    """Ready, and waiting for both words to publish."""
    begin_both(pair, update_id)
    push_both(pair, update_id)
    for committing in commit_both(pair, update_id):
        assert committing.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_APPLYING


@both_kinds
def test_a_version_over_a_group_is_served_from_the_word_to_publish_on(
    pair: Pair, request: pytest.FixtureRequest
) -> None:
    release = request.node.callspec.params["pair"]
    before = pair.engine.weight_version
    decided_on(pair, "word")
    posts = [*made_ready(release), *received(release, 2)]
    assert pair.posts() == posts
    status = pair.status()
    assert (pair.engine.weight_version, status.weight_version, pair.is_paused()) == (before, before, True)
    assert status.current_update.phases[-1].phase == pb.PHASE_DECIDE
    assert list(status.current_update.waiting_for_ranks) == [0]
    outcome = publish(pair, "word").result(ANSWER_S).outcome
    assert (outcome.state, outcome.num_posted) == (pb.UPDATE_STATE_COMMITTED, 2)
    assert pair.posts() == [*posts, PUBLISH, RESUME]
    assert (pair.engine.weight_version, pair.is_paused()) == ("version of word", False)


@both_kinds
def test_a_version_from_memory_is_served_when_every_rank_has_said_so(
    pair: Pair, request: pytest.FixtureRequest
) -> None:
    release = request.node.callspec.params["pair"]
    before = pair.engine.weight_version
    begin_both(pair, "both words", num_buckets=2)
    push_both(pair, "both words", num_buckets=2)
    first = pair.commit("both words", 0)
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [1])
    assert not first.done()
    for committing in (first, pair.commit("both words", 1)):
        outcome = committing.result(ANSWER_S).outcome
        assert (outcome.state, outcome.num_posted) == (pb.UPDATE_STATE_APPLYING, 2)
    assert pair.posts() == expected_posts(release, 2)[:-2]
    assert set(pair.counts()) == {1}, "its memory is free"
    publishing = publish(pair, "both words", 1)
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [0])
    assert (pair.engine.weight_version, publishing.done(), pair.is_paused()) == (before, False, True)
    outcomes = [one.result(ANSWER_S).outcome for one in (publishing, publish(pair, "both words", 0))]
    assert [outcome.state for outcome in outcomes] == [pb.UPDATE_STATE_COMMITTED] * 2
    assert pair.posts() == expected_posts(release, 2)
    assert pair.engine.weight_version == "version of both words"


def test_prepare_moves_the_pause_before_the_first_bucket(pair: Pair) -> None:
    begin_both(pair, "paused early", two_phase=False)
    for preparing in [prepare(pair, "paused early", rank) for rank in range(2)]:
        preparing.result(ANSWER_S)
    assert (pair.posts(), pair.is_paused()) == (made_ready(SESSIONS), True)
    push_both(pair, "paused early")
    for committing in commit_both(pair, "paused early"):
        assert committing.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert pair.posts() == expected_posts(SESSIONS, 1)


def test_one_rank_may_prepare_and_the_other_push(pair: Pair) -> None:
    begin_both(pair, "either way", two_phase=False)
    preparing = prepare(pair, "either way", 0)
    pushing = pair.push("either way", 1, 0)
    preparing.result(ANSWER_S)
    assert not pushing.done()
    pair.push("either way", 0, 0).result(ANSWER_S)
    pushing.result(ANSWER_S)
    for committing in commit_both(pair, "either way"):
        committing.result(ANSWER_S)


def test_every_call_may_be_repeated(pair: Pair) -> None:
    decided_on(pair, "repeats in two phases")
    assert pair.commit("repeats in two phases", 0).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_APPLYING
    first = publish(pair, "repeats in two phases").result(ANSWER_S).outcome
    assert publish(pair, "repeats in two phases").result(ANSWER_S).outcome == first
    assert pair.commit("repeats in two phases", 0).result(ANSWER_S).outcome == first
    assert pair.posts().count(PUBLISH) == 1


@pytest.mark.parametrize("two_phase", [True, False])
def test_a_word_to_publish_that_comes_too_early_is_refused_and_changes_nothing(pair: Pair, two_phase: bool) -> None:
    name = f"too early {two_phase}"
    ready(pair, name, two_phase=two_phase)
    refused = refusal(publish(pair, name))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NOT_PREPARED")
    assert f"rank 0 publishes update '{name}', which is not ready for that (phase load)" in refused.message
    pair.commit(name, 0).result(ANSWER_S)
    assert publish(pair, name).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_rank_that_never_began_publishes_nothing(pair: Pair) -> None:
    decided_on(pair, "decided by rank 0")
    assert refusal(publish(pair, "decided by rank 0", rank=1)).reason == "RANK_OUT_OF_RANGE"
    publish(pair, "decided by rank 0").result(ANSWER_S)


def test_two_phases_need_a_pause(pair: Pair) -> None:
    fields = {"group_name": "", "two_phase": True, "pause_mode": pb.PAUSE_MODE_NONE, "manifest": manifest(1)}
    refused = refusal(begin(pair, "two phases unpaused", tp_size=2, **fields))  # type: ignore[arg-type]
    assert refused.reason == "PAUSE_MODE_UNSUITABLE"
    pair.assert_untouched()


# Between the commit and the word to publish.


@pytest.mark.parametrize("decided", [decided_on, decided_on_from_memory], ids=["group", "memory"])
def test_an_abort_instead_of_the_word_leaves_the_engine_held(
    start: StartPair, decided: Callable[[Pair, str], None]
) -> None:
    pair = start()
    version = pair.engine.weight_version
    decided(pair, "no word")
    outcome = abort(pair, "no word")
    assert (outcome.state, outcome.error_reason) == (pb.UPDATE_STATE_FAILED, "UPDATE_FAILED")
    assert "broke off in phase decide after the engine was touched: rank 0 aborted" in outcome.error
    assert refusal(publish(pair, "no word")).reason == "UPDATE_FAILED"
    assert (PUBLISH in pair.posts(), pair.engine.weight_version) == (False, version)
    assert_dirty(pair)
    assert whole_update(pair, "heals").state == pb.UPDATE_STATE_COMMITTED
    assert not pair.is_paused()


def test_a_caller_that_dies_before_its_word_fails_the_update_at_once(start: StartPair) -> None:
    pair = start()
    ready(pair, "dies", two_phase=True)
    held = hold(pair, "dies")
    pair.commit("dies", 0).result(ANSWER_S)
    held.cancel()
    outcome = ended(pair, "dies", AT_ONCE_S)
    assert outcome.state == pb.UPDATE_STATE_FAILED
    assert "rank 0 cancelled its call, or died, before it had said that the version is to be published" in outcome.error
    assert_dirty(pair)


def test_a_rank_that_dies_while_the_other_has_said_its_word_fails_the_update(start: StartPair) -> None:
    pair = start()
    begin_both(pair, "one word")
    held = hold(pair, "one word", 1)
    push_both(pair, "one word")
    for committing in commit_both(pair, "one word"):
        committing.result(ANSWER_S)
    publishing = publish(pair, "one word", 0)
    pair.status()
    held.cancel()
    assert refusal(publishing).reason == "UPDATE_FAILED"
    assert_dirty(pair)


def test_a_rank_that_dies_after_its_word_is_not_missed(pair: Pair) -> None:
    begin_both(pair, "word was said")
    held = hold(pair, "word was said", 0)
    push_both(pair, "word was said")
    for committing in commit_both(pair, "word was said"):
        committing.result(ANSWER_S)
    publishing = publish(pair, "word was said", 0)
    pair.status()
    publishing.cancel()
    held.cancel()
    time.sleep(0.2)
    assert publish(pair, "word was said", 1).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_commit_that_is_cancelled_before_all_is_ready_fails_the_update(start: StartPair) -> None:
    pair = start()
    ready(pair, "cancelled", two_phase=True)
    pair.engine.fault("/flush_cache", Fault.HANG)
    committing = pair.commit("cancelled", 0)
    wait_until(lambda: pair.engine.num_hanging == 1)
    committing.cancel()
    time.sleep(0.2)
    pair.engine.release()
    assert ended(pair, "cancelled").state == pb.UPDATE_STATE_FAILED
    assert_dirty(pair)


@pytest.mark.parametrize("decided", [decided_on, decided_on_from_memory], ids=["group", "memory"])
def test_the_word_is_waited_for_no_longer_than_the_decide_time_out(
    start: StartPair, decided: Callable[[Pair, str], None]
) -> None:
    pair = start("--decide-timeout", "0.5")
    decided(pair, "late word")
    outcome = ended(pair, "late word")
    assert outcome.state == pb.UPDATE_STATE_FAILED
    assert "waited 0.5 s for rank" in outcome.error
    assert "to publish" in outcome.error
    assert_dirty(pair)
    assert refusal(publish(pair, "late word")).reason == "UPDATE_FAILED"


def test_a_publish_whose_deadline_passes_takes_its_word_not_back(pair: Pair) -> None:
    decided_on_from_memory(pair, "patient word")
    assert refusal(publish(pair, "patient word", 0, timeout_s=2.5)).reason == "STILL_APPLYING"
    assert publish(pair, "patient word", 1).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_an_engine_that_dies_before_the_word_is_not_dirty(start: StartPair) -> None:
    pair = start()
    decided_on(pair, "killed")
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    assert refusal(publish(pair, "killed")).code in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)
    assert pair.outcome("killed").state == pb.UPDATE_STATE_ABORTED
    pair.engine.restart()
    assert pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)
    assert whole_update(pair, "heals").state == pb.UPDATE_STATE_COMMITTED


# The sidecar stops meanwhile.


def test_a_sidecar_that_stops_waits_for_the_word(start: StartPair) -> None:
    pair = start("--drain-timeout", "15")
    decided_on(pair, "in time")
    os.kill(pair.process.pid, signal.SIGTERM)
    pair.wait_for(pb.SIDECAR_STATE_DRAINING)
    assert refusal(begin(pair, "too late", group_name="")).reason == "DRAINING"
    assert publish(pair, "in time").result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert not pair.is_paused()


def test_a_sidecar_that_stops_does_not_wait_for_ever(start: StartPair) -> None:
    pair = start("--drain-timeout", "1")
    decided_on(pair, "no word")
    held = hold(pair, "no word")
    os.kill(pair.process.pid, signal.SIGTERM)
    outcome = held.result(ANSWER_S).outcome
    assert outcome.state == pb.UPDATE_STATE_FAILED
    assert "the sidecar is stopping" in outcome.error
    failed_call(publish(pair, "no word"))  # in the code of whatever the server had come to by then
    assert (PUBLISH in pair.posts(), LOAD in pair.posts(), pair.is_paused()) == (False, False, True)
