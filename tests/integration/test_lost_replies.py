"""A reply that was lost says nothing: the sidecar finds out what became of the call, and never makes it again."""

import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, NO_SESSIONS, SESSIONS, Pair, failed_update, refusal, wait_until

BEGIN, END = "/begin_weight_update", "/end_weight_update"
PROBE = "/update_weights_from_distributed"


@pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)
@pytest.mark.parametrize("bucket", [0, 1, 2])
def test_a_bucket_that_every_rank_has_let_go_was_loaded_though_its_answer_was_lost(pair: Pair, bucket: int) -> None:
    pair.engine.fault(LOAD, Fault.LOSE_REPLY, after=bucket)
    outcome = pair.update(f"{bucket} lost", num_buckets=3)
    assert outcome.state == pb.UPDATE_STATE_COMMITTED
    assert outcome.notes == [f"the answer to the load of bucket {bucket} was lost; every rank had loaded it"]
    assert pair.posts().count(LOAD) == 3
    assert pair.counts() == [1] * 6


def test_a_bucket_that_was_not_opened_was_not_loaded(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.CUT)
    refused = failed_update(pair, "cut")
    assert (refused.reason, refused.details["cause"]) == ("UPDATE_FAILED", "ENGINE_LOST")
    assert pair.posts().count(LOAD) == 1
    assert pair.counts() == [2, 2]


def test_a_load_that_outlasts_its_time_is_waited_for_no_longer_than_a_look(start: StartPair) -> None:
    pair = start("--load-timeout", "0.5", "--probe-timeout", "0.5", "--session-timeout", "0.5")
    pair.engine.fault(LOAD, Fault.HANG)
    refused = failed_update(pair, "hangs")
    assert refused.reason == "UPDATE_FAILED"
    assert pair.status().state in (pb.SIDECAR_STATE_DIRTY, pb.SIDECAR_STATE_ENGINE_UNREACHABLE)
    pair.engine.release()
    pair.wait_for(pb.SIDECAR_STATE_DIRTY)
    assert pair.update("heals").state == pb.UPDATE_STATE_COMMITTED


def test_a_late_load_that_is_seen_to_have_ended_counts(start: StartPair) -> None:
    pair = start("--load-timeout", "0.5")
    pair.engine.fault(LOAD, Fault.LATE, delay_s=3.0)  # it acts at once, and only its answer is late
    outcome = pair.update("late")
    assert outcome.state == pb.UPDATE_STATE_COMMITTED
    assert len(outcome.notes) == 1


def test_a_begin_whose_answer_was_lost_has_opened_the_session(pair: Pair) -> None:
    pair.engine.fault(BEGIN, Fault.LOSE_REPLY)
    outcome = pair.update("begin lost")
    assert outcome.notes == ["the answer to begin_weight_update was lost; the session is open"]
    assert pair.posts()[:4] == ["/pause_generation", BEGIN, PROBE, LOAD]
    assert pair.posts().count(BEGIN) == 1


def test_an_end_whose_answer_was_lost_has_closed_the_session(pair: Pair) -> None:
    pair.engine.fault(END, Fault.LOSE_REPLY)
    outcome = pair.update("end lost")
    assert outcome.notes == ["the answer to end_weight_update was lost; the session is closed"]
    assert pair.posts()[2:5] == [LOAD, END, PROBE]


def test_an_end_that_never_came_leaves_the_engine_dirty_and_the_next_update_ends_the_session(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(END, Fault.CUT)
    refused = failed_update(pair, "cut")
    assert "broke off in phase end" in refused.message
    assert pair.engine.session_open
    assert pair.is_paused()
    assert pair.update("heals").state == pb.UPDATE_STATE_COMMITTED
    assert not pair.engine.session_open


def test_a_flush_that_is_never_answered_is_said_and_does_not_fail_the_update(pair: Pair) -> None:
    pair.engine.fault("/flush_cache", Fault.CUT, times=100)
    outcome = pair.update("never flushed")
    pair.engine.forget_faults()
    assert (outcome.state, outcome.cache_flushed) == (pb.UPDATE_STATE_COMMITTED, False)
    assert "kept the prefix cache from being flushed" in outcome.notes[0]


def test_an_engine_that_does_not_pause_in_a_callers_time_aborts_the_update(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/pause_generation", Fault.LATE, delay_s=4.0)
    answers = [pair.send(pair.request("impatient", rank), timeout_s=2.0) for rank in range(2)]
    for answer in answers:
        assert refusal(answer).reason == "STILL_APPLYING"
    wait_until(lambda: pair.outcome("impatient").state == pb.UPDATE_STATE_ABORTED)
    outcome = pair.outcome("impatient")
    assert outcome.error_reason == "ENGINE_TIMEOUT"
    assert "phase pause waited for the engine, not for a rank" in outcome.error
    assert LOAD not in pair.posts()
    wait_until(lambda: not pair.is_paused())
