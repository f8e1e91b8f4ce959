"""A rank of a bucketed update that shows that it lives, and what happens at once when it no longer does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, LOAD, Pair, Refusal, failed_call, refusal, wait_until

Held: TypeAlias = "grpc.Future[pb.HoldUpdateResponse]"

BEGIN, END = "/begin_weight_update", "/end_weight_update"
PAUSE, RESUME = "/pause_generation", "/continue_generation"
# Far below the bucket time-out of 300 s, which is what ends an update whose ranks hold nothing.
AT_ONCE_S = 15.0
HOLDER = """
import sys, grpc
from sidecar.v1 import weight_sync_pb2 as pb, weight_sync_pb2_grpc as rpc
target, update_id, rank = sys.argv[1:]
stub = rpc.WeightSyncServiceStub(grpc.insecure_channel(target))
held = stub.HoldUpdate.future(pb.HoldUpdateRequest(update_id=update_id, rank=int(rank)), timeout=60)
stub.GetStatus(pb.GetStatusRequest(), timeout=20)  # answered after the call before it has begun
print("holding", flush=True)
sys.stdin.read(1)
"""


def hold(pair: Pair, update_id: str, rank: int, timeout_s: float = ANSWER_S) -> Held:
    """Open at the sidecar by the time that this returns."""
    request = pb.HoldUpdateRequest(update_id=update_id, rank=rank)
    held = pair.rpc.HoldUpdate.future(request, timeout=timeout_s)
    pair.status()  # answered after the call before it has begun
    return held


def push_all(pair: Pair, update_id: str, bucket: int) -> None:
    for push in [pair.push(update_id, rank, bucket) for rank in range(2)]:
        push.result(ANSWER_S)


def between_buckets(pair: Pair, update_id: str, num_buckets: int = 2) -> list[Held]:
    """Both ranks hold an update of which the first bucket is loaded."""
    pair.begin(update_id, num_buckets=num_buckets)
    held = [hold(pair, update_id, rank) for rank in range(2)]
    push_all(pair, update_id, 0)
    return held


def ends_at_once(pair: Pair, update_id: str) -> pb.UpdateOutcome:
    wait_until(lambda: pair.outcome(update_id).state > pb.UPDATE_STATE_APPLYING, timeout_s=AT_ONCE_S)
    return pair.outcome(update_id)


def assert_failed_and_held(pair: Pair, update_id: str) -> None:
    outcome = ends_at_once(pair, update_id)
    assert (outcome.state, outcome.error_reason) == (pb.UPDATE_STATE_FAILED, "UPDATE_FAILED")
    assert "rank 0 cancelled its call, or died, before the engine had its memory" in outcome.error
    assert pair.is_paused()
    assert not pair.engine.session_open, "an open session would be in the way of the next update"
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY


@contextmanager
def holder(pair: Pair, update_id: str, rank: int) -> Iterator[subprocess.Popen[bytes]]:
    """A rank as a process of its own, which holds and does nothing else."""
    command = [sys.executable, "-c", HOLDER, pair.target, update_id, str(rank)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"holding\n"
            yield process
        finally:
            process.kill()


def test_a_hold_ends_with_its_update_and_tells_how(pair: Pair) -> None:
    held = between_buckets(pair, "held", num_buckets=2)
    assert not any(one.done() for one in held)
    push_all(pair, "held", 1)
    for commit in [pair.commit("held", rank) for rank in range(2)]:
        commit.result(ANSWER_S)
    outcomes = [one.result(ANSWER_S).outcome for one in held]
    assert outcomes == [pair.outcome("held")] * 2
    assert outcomes[0].state == pb.UPDATE_STATE_COMMITTED


def test_a_hold_of_an_update_that_has_ended_tells_at_once(pair: Pair) -> None:
    pair.begin("held over")
    held = hold(pair, "held over", 0)
    pair.rpc.AbortUpdate(pb.AbortUpdateRequest(update_id="held over", rank=1, reason="no more"), timeout=ANSWER_S)
    for one in (held, hold(pair, "held over", 1)):
        outcome = one.result(ANSWER_S).outcome
        assert (outcome.state, outcome.error_reason) == (pb.UPDATE_STATE_ABORTED, "UPDATE_ABORTED")
        assert outcome.error == "rank 1 aborted update 'held over': no more"


def test_a_hold_of_what_was_never_begun_is_refused(pair: Pair) -> None:
    assert refusal(hold(pair, "unheard of", 0)).code is grpc.StatusCode.NOT_FOUND
    waiting = pair.send(pair.request("of rank 0"))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    refused: Refusal = refusal(hold(pair, "of rank 0", 1))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "RANK_OUT_OF_RANGE")
    waiting.cancel()


def test_the_death_of_a_process_between_buckets_ends_the_update_at_once(start: StartPair) -> None:
    pair = start()
    pair.begin("killed")
    with holder(pair, "killed", 0) as rank_0:
        push_all(pair, "killed", 0)
        waiting = pair.push("killed", 1, 1)
        rank_0.send_signal(signal.SIGKILL)
        rank_0.wait()
        assert_failed_and_held(pair, "killed")
    refused = refusal(waiting)
    assert refused.reason == "UPDATE_FAILED"
    assert "rank 0 cancelled its call, or died" in refused.message
    assert pair.posts() == [PAUSE, BEGIN, LOAD, END]
    assert pair.counts()[-1] == 2, "the engine never saw the second bucket"
    assert pair.update("killed").state == pb.UPDATE_STATE_COMMITTED


def test_a_channel_that_is_cut_between_buckets_ends_the_update_at_once(start: StartPair) -> None:
    pair = start()
    pair.begin("cut")
    channel = grpc.insecure_channel(pair.target, options=[("grpc.use_local_subchannel_pool", 1)])
    stub = pb_grpc.WeightSyncServiceStub(channel)
    held = stub.HoldUpdate.future(pb.HoldUpdateRequest(update_id="cut", rank=0), timeout=ANSWER_S)
    stub.GetStatus(pb.GetStatusRequest(), timeout=ANSWER_S)
    push_all(pair, "cut", 0)
    channel.close()
    wait_until(held.done)
    assert_failed_and_held(pair, "cut")


def test_a_rank_that_dies_while_ranks_arrive_costs_the_engine_nothing(pair: Pair) -> None:
    pair.begin("early")
    held = [hold(pair, "early", rank) for rank in range(2)]
    held[0].cancel()
    assert held[1].result(ANSWER_S).outcome.state == pb.UPDATE_STATE_ABORTED
    assert "rank 0 cancelled its call, or died" in pair.outcome("early").error
    pair.assert_untouched()


def test_a_hold_whose_deadline_passes_is_no_death(pair: Pair) -> None:
    pair.begin("patient")
    push_all(pair, "patient", 0)
    refused = refusal(hold(pair, "patient", 0, timeout_s=3.0))  # the answer comes a tenth of that early
    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "STILL_APPLYING")
    assert refused.message == "update 'patient' is still applying; hold it again"
    push_all(pair, "patient", 1)
    for commit in [pair.commit("patient", rank) for rank in range(2)]:
        assert commit.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_hold_whose_deadline_passes_while_the_sidecar_is_slow_is_no_death_either(start: StartPair) -> None:
    """Then the deadline is seen as a call that was cut before the answer to it was on its way."""
    pair = start()
    pair.begin("slow")
    held = hold(pair, "slow", 0, timeout_s=4.0)
    os.kill(pair.process.pid, signal.SIGSTOP)
    try:
        assert failed_call(held).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        os.kill(pair.process.pid, signal.SIGCONT)
    for bucket in range(2):
        push_all(pair, "slow", bucket)
    for commit in [pair.commit("slow", rank) for rank in range(2)]:
        assert commit.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_hold_that_is_let_go_while_its_rank_commits_changes_nothing(pair: Pair) -> None:
    held = between_buckets(pair, "let go")
    push_all(pair, "let go", 1)
    first = pair.commit("let go", 0)
    pair.status()
    held[0].cancel()
    time.sleep(0.2)
    assert pair.status().state == pb.SIDECAR_STATE_APPLYING
    assert pair.commit("let go", 1).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert first.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_rank_that_dies_after_it_has_committed_changes_nothing(pair: Pair) -> None:
    held = between_buckets(pair, "all said")
    push_all(pair, "all said", 1)
    first = pair.commit("all said", 0)
    pair.status()
    first.cancel()
    held[0].cancel()
    time.sleep(0.2)
    assert pair.commit("all said", 1).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_hold_that_is_let_go_after_the_commit_changes_nothing(pair: Pair) -> None:
    held = between_buckets(pair, "committed")
    push_all(pair, "committed", 1)
    for commit in [pair.commit("committed", rank) for rank in range(2)]:
        commit.result(ANSWER_S)
    for one in held:
        one.cancel()
    assert pair.outcome("committed").state == pb.UPDATE_STATE_COMMITTED
    assert pair.update("goes on after a hold").state == pb.UPDATE_STATE_COMMITTED


def test_one_of_two_holds_is_enough(pair: Pair) -> None:
    held = [*between_buckets(pair, "held twice"), hold(pair, "held twice", 0)]
    held[0].cancel()
    time.sleep(0.2)
    push_all(pair, "held twice", 1)
    for commit in [pair.commit("held twice", rank) for rank in range(2)]:
        assert commit.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_rank_that_dies_between_its_last_bucket_and_its_commit_ends_the_update_at_once(start: StartPair) -> None:
    """It will never commit, and generation is paused."""
    pair = start()
    held = between_buckets(pair, "uncommitted")
    push_all(pair, "uncommitted", 1)
    waiting = pair.commit("uncommitted", 1)
    pair.status()
    held[0].cancel()
    outcome = ends_at_once(pair, "uncommitted")
    assert (outcome.state, outcome.num_posted) == (pb.UPDATE_STATE_FAILED, 2)
    assert refusal(waiting).reason == "UPDATE_FAILED"
    assert not pair.engine.session_open
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_holds_nothing_is_waited_for_as_before(start: StartPair, rank: int) -> None:
    pair = start("--bucket-timeout", "1")
    pair.begin("silent")
    held = hold(pair, "silent", 1 - rank)
    push_all(pair, "silent", 0)
    outcome = held.result(ANSWER_S).outcome
    assert (outcome.state, outcome.error_reason) == (pb.UPDATE_STATE_FAILED, "UPDATE_FAILED")
    assert "waited 1.0 s for ranks 0, 1 to deliver bucket 1" in outcome.error


def test_an_update_that_is_tried_again_under_its_id_is_held_anew(pair: Pair) -> None:
    pair.begin("held again")
    first = hold(pair, "held again", 0)
    pair.rpc.AbortUpdate(pb.AbortUpdateRequest(update_id="held again", rank=1), timeout=ANSWER_S)
    assert first.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_ABORTED
    held = between_buckets(pair, "held again")
    push_all(pair, "held again", 1)
    for commit in [pair.commit("held again", rank) for rank in range(2)]:
        commit.result(ANSWER_S)
    assert held[0].result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
