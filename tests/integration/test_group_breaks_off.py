"""Updates over a group that break off: before anything was received, during a receive, and after."""

from __future__ import annotations

import time

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.groups import (
    BEGIN,
    DESTROY,
    END,
    PAUSE,
    PUBLISH,
    RECEIVE,
    RESUME,
    abort,
    assert_dirty,
    assert_goes_on_with_old_weights,
    begin,
    ended,
    hold,
    joined,
    prepare,
    ready,
    refused_commit,
    whole_update,
)
from tests.integration.support import ANSWER_S, NO_SESSIONS, Pair, refusal, wait_until

NOT_RECEIVED = "Failed to receive weights: Connection closed by peer"
PARTIALLY = "Failed to update parameter online: x. The full weights of the ModelRunner are partially updated."
AT_ONCE_S = 10.0


def heals(pair: Pair, update_id: str = "heals") -> None:
    assert whole_update(pair, update_id).state == pb.UPDATE_STATE_COMMITTED
    assert not pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_READY


# Nothing was received yet.


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_caller_that_dies_after_begin_costs_the_engine_nothing(pair: Pair, tp_size: int) -> None:
    joined(pair, "died early")
    begin(pair, "died early", tp_size=tp_size).result(ANSWER_S)
    hold(pair, "died early").cancel()
    outcome = ended(pair, "died early", AT_ONCE_S)
    assert outcome.state == pb.UPDATE_STATE_ABORTED
    assert "rank 0 cancelled its call, or died, before the engine had its broadcast" in outcome.error
    pair.assert_untouched()
    assert pair.engine.groups == ["died early"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_caller_that_dies_after_prepare_lets_the_engine_go_on(pair: Pair, rank: int) -> None:
    before = pair.engine.loaded
    ready(pair, f"prepared {rank}", tp_size=2)
    held = [hold(pair, f"prepared {rank}", number) for number in range(2)]
    held[rank].cancel()
    outcome = held[1 - rank].result(ANSWER_S).outcome
    assert (outcome.state, outcome.num_posted, outcome.error_reason) == (pb.UPDATE_STATE_ABORTED, 0, "UPDATE_ABORTED")
    assert pair.posts() == [PAUSE, BEGIN, END, RESUME]
    assert_goes_on_with_old_weights(pair, before)
    assert pair.engine.groups == [f"prepared {rank}"], "nothing is wrong with the group"


def test_a_caller_that_dies_while_the_engine_is_made_ready_lets_it_go_on(pair: Pair) -> None:
    before = pair.engine.loaded
    joined(pair, "dies preparing")
    begin(pair, "dies preparing").result(ANSWER_S)
    pair.engine.fault(BEGIN, Fault.HANG)
    preparing = prepare(pair, "dies preparing")
    wait_until(lambda: pair.engine.num_hanging == 1)
    preparing.cancel()
    time.sleep(0.2)
    pair.engine.release()
    assert ended(pair, "dies preparing").state == pb.UPDATE_STATE_ABORTED
    assert_goes_on_with_old_weights(pair, before)


def test_an_abort_after_prepare_lets_the_engine_go_on(pair: Pair) -> None:
    before = pair.engine.loaded
    ready(pair, "given up when ready")
    assert abort(pair, "given up when ready").state == pb.UPDATE_STATE_ABORTED
    assert_goes_on_with_old_weights(pair, before)
    assert refusal(prepare(pair, "given up when ready")).reason == "UPDATE_ABORTED"


def test_a_sender_that_says_nothing_after_prepare_is_waited_for_until_the_bucket_time_out(start: StartPair) -> None:
    pair = start("--bucket-timeout", "1")
    before = pair.engine.loaded
    ready(pair, "silent")
    outcome = ended(pair, "silent")
    assert (outcome.state, outcome.error_reason) == (pb.UPDATE_STATE_ABORTED, "RANKS_MISSING")
    assert "waited 1.0 s for rank 0 to commit; the engine was not touched" in outcome.error
    assert_goes_on_with_old_weights(pair, before)


@pytest.mark.parametrize("path", [PAUSE, BEGIN])
def test_an_engine_that_refuses_to_be_made_ready_says_so_to_prepare(pair: Pair, path: str) -> None:
    joined(pair, f"not with {path[1:6]}")
    begin(pair, f"not with {path[1:6]}").result(ANSWER_S)
    pair.engine.fault(path, Fault.REFUSE, message="not today")
    refused = refusal(prepare(pair, f"not with {path[1:6]}"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_REFUSED")
    assert ended(pair, f"not with {path[1:6]}").state == pb.UPDATE_STATE_ABORTED
    assert not pair.is_paused()


# A receive that the engine refuses.


def test_what_an_engine_with_one_rank_did_not_receive_it_did_not_load(start: StartPair) -> None:
    pair = start(tp_size=1)
    before = pair.engine.loaded
    ready(pair, "first bucket")
    pair.engine.fault(RECEIVE, Fault.REFUSE, message=NOT_RECEIVED)
    refused = refused_commit(pair, "first bucket")
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_REFUSED")
    assert "Connection closed by peer" in refused.message
    assert pair.outcome("first bucket").state == pb.UPDATE_STATE_ABORTED
    assert pair.posts() == [PAUSE, BEGIN, RECEIVE, DESTROY, END, RESUME]
    assert_goes_on_with_old_weights(pair, before)
    assert pair.engine.groups == []
    assert refusal(begin(pair, "again", group_name="first bucket")).reason == "GROUP_UNKNOWN"
    heals(pair)


def test_what_the_first_of_two_ranks_did_not_receive_the_second_may_have_loaded(start: StartPair) -> None:
    """SGLang answers for the first alone."""
    pair = start()
    ready(pair, "two ranks")
    pair.engine.fault(RECEIVE, Fault.REFUSE, message=NOT_RECEIVED)
    assert refused_commit(pair, "two ranks").reason == "UPDATE_FAILED"
    assert pair.posts() == [PAUSE, BEGIN, RECEIVE, DESTROY, END]
    assert_dirty(pair)
    heals(pair)


def test_a_second_bucket_that_is_not_received_leaves_the_first_one_written(start: StartPair) -> None:
    pair = start(tp_size=1)
    ready(pair, "second bucket")
    pair.engine.fault(RECEIVE, Fault.REFUSE, message=NOT_RECEIVED, after=1)
    refused = refused_commit(pair, "second bucket")
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "UPDATE_FAILED")
    assert "broke off in phase load at bucket 1 of 2 after the engine was touched" in refused.message
    assert pair.posts() == [PAUSE, BEGIN, RECEIVE, RECEIVE, DESTROY, END]
    assert_dirty(pair)
    assert pair.engine.groups == []
    heals(pair)


@pytest.mark.parametrize("release", ["0.5.23", NO_SESSIONS])
def test_half_a_load_is_a_failure(start: StartPair, release: str) -> None:
    pair = start(release=release, tp_size=1)
    ready(pair, "half")
    pair.engine.fault(RECEIVE, Fault.REFUSE, message=PARTIALLY)
    assert refused_commit(pair, "half").reason == "UPDATE_FAILED"
    assert pair.posts()[-1] == (END if release != NO_SESSIONS else DESTROY)
    assert DESTROY in pair.posts()
    assert_dirty(pair)
    heals(pair)


# A receive without an answer.


@pytest.mark.parametrize("bucket", [0, 1])
def test_a_receive_whose_answer_is_lost_is_a_failure(start: StartPair, bucket: int) -> None:
    pair = start()
    ready(pair, "lost")
    pair.engine.fault(RECEIVE, Fault.LOSE_REPLY, after=bucket)
    refused = refused_commit(pair, "lost")
    assert (refused.reason, refused.details["cause"]) == ("UPDATE_FAILED", "ENGINE_LOST")
    assert f"whether every rank has received bucket {bucket} cannot be told" in refused.message
    assert pair.posts() == [PAUSE, BEGIN, *[RECEIVE] * (bucket + 1), DESTROY, END]
    assert_dirty(pair)
    assert pair.engine.groups == []
    heals(pair)


def test_a_receive_that_hangs_ends_with_the_load_time_out(start: StartPair) -> None:
    pair = start("--load-timeout", "0.5", "--probe-timeout", "0.5", "--session-timeout", "0.5")
    ready(pair, "hangs")
    pair.engine.fault(RECEIVE, Fault.HANG)
    refused = refused_commit(pair, "hangs")
    assert refused.reason == "UPDATE_FAILED"
    assert "no answer within 0.5 s" in refused.message
    assert DESTROY in pair.posts(), "so that no other member waits for this one, once the scheduler can be told"
    pair.engine.release()
    wait_until(lambda: pair.engine.groups == [])
    pair.wait_for(pb.SIDECAR_STATE_DIRTY)
    heals(pair)


def test_a_caller_that_dies_during_a_receive_fails_the_update_though_that_one_comes_through(start: StartPair) -> None:
    pair = start()
    ready(pair, "dies")
    pair.engine.fault(RECEIVE, Fault.HANG)
    committing = pair.commit("dies", 0)
    wait_until(lambda: pair.engine.num_hanging == 1)
    committing.cancel()
    time.sleep(0.2)
    pair.engine.release()
    outcome = ended(pair, "dies")
    assert (outcome.state, outcome.num_posted) == (pb.UPDATE_STATE_FAILED, 1)
    assert "rank 0 cancelled its call, or died, before the engine had its broadcast" in outcome.error
    assert pair.posts() == [PAUSE, BEGIN, RECEIVE, DESTROY, END]
    assert_dirty(pair)
    heals(pair)


def test_another_rank_that_dies_after_it_has_committed_is_not_missed(pair: Pair) -> None:
    ready(pair, "not missed", tp_size=2)
    held = hold(pair, "not missed", 1)
    pair.engine.fault(RECEIVE, Fault.HANG)
    committing = [pair.commit("not missed", rank) for rank in (1, 0)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    held.cancel()
    committing[0].cancel()
    time.sleep(0.2)
    pair.engine.release()
    assert committing[1].result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


@pytest.mark.parametrize("fault", [Fault.DIE, Fault.DIE_AFTER, Fault.HALF_LOAD])
def test_an_engine_that_dies_of_a_receive_is_not_dirty(start: StartPair, fault: Fault) -> None:
    pair = start()
    ready(pair, "killed")
    pair.engine.fault(RECEIVE, fault, after=1)
    assert refusal(pair.commit("killed", 0)).code is grpc.StatusCode.ABORTED
    assert pair.outcome("killed").state == pb.UPDATE_STATE_ABORTED
    pair.engine.restart()
    pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)
    heals(pair)


def test_an_abort_during_a_receive_waits_for_that_and_fails(start: StartPair) -> None:
    pair = start()
    ready(pair, "abort", tp_size=2)
    pair.engine.fault(RECEIVE, Fault.LATE, delay_s=0.5)
    committing = pair.commit("abort", 0)
    wait_until(lambda: RECEIVE in pair.posts())
    assert abort(pair, "abort", 1).state == pb.UPDATE_STATE_FAILED
    assert refusal(committing).reason == "UPDATE_FAILED"
    assert PUBLISH not in pair.posts()
    assert_dirty(pair)
