"""An update bucket by bucket: begin, push, commit, abort."""

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import (
    ANSWER_S,
    LOAD,
    NO_SESSIONS,
    SESSIONS,
    Pair,
    expected_posts,
    refusal,
    wait_until,
)


def abort(pair: Pair, update_id: str, rank: int = 0, reason: str = "out of memory") -> pb.UpdateOutcome:
    request = pb.AbortUpdateRequest(update_id=update_id, rank=rank, reason=reason)
    return pair.rpc.AbortUpdate(request, timeout=ANSWER_S).outcome


def push_all(pair: Pair, update_id: str, bucket: int) -> None:
    for push in [pair.push(update_id, rank, bucket) for rank in range(2)]:
        push.result(ANSWER_S)


def commit_all(pair: Pair, update_id: str) -> list[pb.UpdateOutcome]:
    return [commit.result(ANSWER_S).outcome for commit in [pair.commit(update_id, rank) for rank in range(2)]]


@pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)
def test_buckets_are_posted_one_by_one_and_the_version_is_published_at_the_commit(
    pair: Pair, request: pytest.FixtureRequest
) -> None:
    before = pair.engine.weight_version
    pair.begin("buckets", num_buckets=3)
    assert pair.posts() == []
    for bucket in range(3):
        push_all(pair, "buckets", bucket)
        assert pair.posts().count(LOAD) == bucket + 1
        assert set(pair.counts()) == {1}  # answered, so the memory is free
    assert pair.engine.weight_version == before
    assert pair.status().state == pb.SIDECAR_STATE_APPLYING
    outcomes = commit_all(pair, "buckets")
    assert [(outcome.state, outcome.num_posted) for outcome in outcomes] == [(pb.UPDATE_STATE_COMMITTED, 3)] * 2
    assert pair.posts() == expected_posts(request.node.callspec.params["pair"], 3)
    assert all(body["flush_cache"] is False for body in pair.bodies(LOAD))
    assert pair.engine.weight_version == "version of buckets"
    assert not pair.is_paused()


def test_buckets_that_are_pushed_ahead_and_out_of_order_are_loaded_in_the_manifests_order(pair: Pair) -> None:
    pair.begin("ahead", num_buckets=3)
    pushes = [pair.push("ahead", rank, bucket) for bucket in (2, 1) for rank in (1, 0)]
    assert pair.posts() == []
    pushes += [pair.push("ahead", rank, 0) for rank in range(2)]
    for push in pushes:
        push.result(ANSWER_S)
    commit_all(pair, "ahead")
    loads = [call for call in pair.engine.calls if call.path == LOAD][-3:]
    assert [load.entries[0].tensors[0].name for load in loads] == [f"layer.{number}.weight" for number in range(3)]


def test_a_fast_rank_may_push_before_a_slow_one_begins(pair: Pair) -> None:
    pair.begin("uneven", tp_size=2, num_buckets=1)
    fast = pair.push("uneven", 0, 0)
    assert pair.posts() == []
    pair.push("uneven", 1, 0).result(ANSWER_S)
    fast.result(ANSWER_S)
    assert [outcome.state for outcome in commit_all(pair, "uneven")] == [pb.UPDATE_STATE_COMMITTED] * 2


def test_begin_push_and_commit_may_be_repeated(pair: Pair) -> None:
    pair.begin("repeats", num_buckets=1)
    pair.begin("repeats", num_buckets=1)
    handles = [pair.handle() for _ in range(2)]
    pushes = [pb.PushBucketRequest(update_id="repeats", rank=r, bucket=0, handle=h) for r, h in enumerate(handles)]
    answers = [pair.rpc.PushBucket.future(push, timeout=ANSWER_S) for push in (pushes[0], pushes[0], pushes[1])]
    for answer in answers:
        answer.result(ANSWER_S)
    pair.rpc.PushBucket(pushes[1], timeout=ANSWER_S)
    first = commit_all(pair, "repeats")
    assert commit_all(pair, "repeats") == first
    assert pair.posts() == expected_posts(SESSIONS, 1)


def test_begin_tells_the_digest(pair: Pair) -> None:
    digest = pair.update("for its digest", num_buckets=2).manifest_digest
    header = pb.UpdateHeader(update_id="digested", weight_version="v", rank=0, tp_size=2)
    request = pb.BeginUpdateRequest(update=header, manifest=pb.ManifestReference(digest=digest))
    assert pair.rpc.BeginUpdate(request, timeout=ANSWER_S).manifest_digest == digest
    abort(pair, "digested")


def test_an_abort_before_the_first_bucket_changes_nothing_and_tells_the_others(pair: Pair) -> None:
    pair.begin("given up")
    pushed = pair.push("given up", 0, 0)
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [1])
    outcome = abort(pair, "given up", rank=1)
    assert (outcome.state, outcome.error_reason) == (pb.UPDATE_STATE_ABORTED, "UPDATE_ABORTED")
    refused = refusal(pushed)
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "UPDATE_ABORTED")
    assert "rank 1 aborted update 'given up': out of memory" in refused.message
    pair.assert_untouched()


def test_an_abort_of_a_one_call_update_that_is_collected_ends_it_for_all(pair: Pair) -> None:
    waiting = pair.send(pair.request("one call", 0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    abort(pair, "one call")
    assert refusal(waiting).reason == "UPDATE_ABORTED"
    pair.assert_untouched()


def test_an_abort_after_applying_began_leaves_the_engine_paused_until_the_next_update(start: StartPair) -> None:
    pair = start()
    pair.begin("too late", num_buckets=2)
    push_all(pair, "too late", 0)
    outcome = abort(pair, "too late", rank=1)
    assert (outcome.state, outcome.error_reason) == (pb.UPDATE_STATE_FAILED, "UPDATE_FAILED")
    assert "broke off in phase load at bucket 1 of 2 after the engine was touched: rank 1 aborted" in outcome.error
    assert pair.posts() == ["/pause_generation", "/begin_weight_update", LOAD, "/end_weight_update"]
    assert pair.is_paused()
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_DIRTY, "")
    assert pair.update("heals").state == pb.UPDATE_STATE_COMMITTED
    assert not pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_complete_update_cannot_be_aborted_any_more(pair: Pair) -> None:
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("complete", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    request = pb.AbortUpdateRequest(update_id="complete", rank=0)
    refused = refusal(pair.rpc.AbortUpdate.future(request, timeout=5))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_ABORTABLE")
    pair.engine.release()
    assert [answer.result(ANSWER_S).outcome.state for answer in answers] == [pb.UPDATE_STATE_COMMITTED] * 2


def test_an_abort_of_an_update_that_ended_without_success_tells_how_it_ended(pair: Pair) -> None:
    pair.begin("over")
    first = abort(pair, "over")
    assert abort(pair, "over", rank=1, reason="me too") == first
    assert first.error == "rank 0 aborted update 'over': out of memory"


def test_a_committed_update_cannot_be_aborted(pair: Pair) -> None:
    pair.update("done")
    refused = refusal(pair.rpc.AbortUpdate.future(pb.AbortUpdateRequest(update_id="done", rank=0), timeout=5))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_ABORTABLE")


def test_a_cancelled_push_ends_the_update_since_its_memory_may_be_gone(start: StartPair) -> None:
    pair = start()
    pair.begin("given up", num_buckets=2)
    push_all(pair, "given up", 0)
    lost = pair.push("given up", 0, 1)
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [1])
    lost.cancel()
    pair.wait_for(pb.SIDECAR_STATE_DIRTY)
    outcome = pair.outcome("given up")
    assert (outcome.state, outcome.num_posted) == (pb.UPDATE_STATE_FAILED, 1)
    assert "rank 0 cancelled its call, or died, before the engine had its memory" in outcome.error
    assert pair.is_paused()
    assert pair.update("complete").state == pb.UPDATE_STATE_COMMITTED
