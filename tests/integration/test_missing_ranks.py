"""A rank that does not come: the others learn which one, at their own deadline, and the engine serves on."""

import re
import time

import grpc

from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.integration.conftest import StartPair
from tests.integration.support import Pair, expected_posts, refusal, wait_until

DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_missing_rank_is_named_at_the_others_deadline_and_nothing_is_touched(pair: Pair) -> None:
    started = time.monotonic()
    refused = refusal(pair.send(pair.request("waits", rank=0), timeout_s=2.5))
    assert time.monotonic() - started < 10.0
    assert (refused.code, refused.reason) == (DEADLINE, "RANKS_MISSING")
    said = (
        r"update 'waits': waited [12]\.\d s for rank 1 to arrive; the engine was not touched and serves the old weights"
    )
    assert re.fullmatch(said, refused.message)
    assert refused.details == {"updateId": "waits", "ranks": "1"}
    pair.assert_untouched()
    assert pair.outcome("waits").state == pb.UPDATE_STATE_ABORTED
    assert pair.outcome("waits").error_reason == "RANKS_MISSING"


def test_all_missing_ranks_are_named_to_all_that_came(start: StartPair) -> None:
    pair = start(tp_size=4)
    patient = pair.send(pair.request("many wait", rank=2, tp_size=4))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    hasty = pair.send(pair.request("many wait", rank=0, tp_size=4), timeout_s=2.5)
    for refused in (refusal(hasty), refusal(patient)):
        assert (refused.code, refused.reason) == (DEADLINE, "RANKS_MISSING")
        assert "for ranks 1, 3 to arrive" in refused.message
    pair.assert_untouched()


def test_status_names_the_ranks_that_are_waited_for(pair: Pair) -> None:
    waiting = pair.send(pair.request("visible", rank=1))
    status = pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    assert list(status.current_update.waiting_for_ranks) == [0]
    waiting.cancel()
    pair.wait_for(pb.SIDECAR_STATE_READY)
    pair.assert_untouched()


def test_the_sidecars_own_limit_ends_the_wait_of_a_call_without_a_deadline(start: StartPair) -> None:
    pair = start("--collect-timeout", "0.5")
    refused = refusal(pair.rpc.UpdateWeights.future(pair.request("endless")))
    assert (refused.code, refused.reason) == (DEADLINE, "RANKS_MISSING")
    assert "waited 0.5 s for rank 1 to arrive" in refused.message
    pair.assert_untouched()


def test_a_rank_that_cancels_ends_the_update_for_all_with_its_name(start: StartPair) -> None:
    pair = start(tp_size=3)
    stays = pair.send(pair.request("cancelled", rank=0, tp_size=3))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    leaves = pair.send(pair.request("cancelled", rank=1, tp_size=3))
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [2])
    leaves.cancel()
    refused = refusal(stays)
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "UPDATE_ABORTED")
    assert "update 'cancelled': rank 1 cancelled its call, or died, before the engine had its memory" in refused.message
    pair.assert_untouched()


def test_a_rank_whose_connection_breaks_counts_as_cancelled(start: StartPair) -> None:
    pair = start(tp_size=3)
    stays = pair.send(pair.request("broken off", rank=0, tp_size=3))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    channel = grpc.insecure_channel(pair.target, options=[("grpc.use_local_subchannel_pool", 1)])
    request = pair.request("broken off", rank=1, tp_size=3)
    leaves = pb_grpc.WeightSyncServiceStub(channel).UpdateWeights.future(request)
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [2])
    channel.close()
    wait_until(leaves.done)
    assert "rank 1 cancelled its call, or died" in refusal(stays).message
    pair.assert_untouched()


def test_after_a_missing_rank_the_same_update_goes_through_when_all_come(pair: Pair) -> None:
    assert refusal(pair.send(pair.request("second try", rank=0), timeout_s=2.5)).reason == "RANKS_MISSING"
    assert pair.update("second try").state == pb.UPDATE_STATE_COMMITTED
    assert pair.posts() == expected_posts("0.5.23", 1)


def test_a_missing_rank_is_named_for_a_bucketed_update_too(pair: Pair) -> None:
    pair.begin("half pushed")
    refused = refusal(pair.push("half pushed", 0, 0, timeout_s=2.5))
    assert (refused.code, refused.reason) == (DEADLINE, "RANKS_MISSING")
    assert "for rank 1 to arrive with their first bucket; the engine was not touched" in refused.message
    pair.assert_untouched()


def test_a_rank_that_stops_after_the_first_bucket_is_named_and_the_engine_is_dirty(start: StartPair) -> None:
    pair = start("--bucket-timeout", "0.5")
    pair.begin("stopped")
    pushes = [pair.push("stopped", rank, 0) for rank in range(2)]
    for push in pushes:
        push.result(5)
    refused = refusal(pair.push("stopped", 0, 1))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "UPDATE_FAILED")
    assert "waited 0.5 s for rank 1 to deliver bucket 1" in refused.message
    assert "generation stays paused until a complete update is loaded" in refused.message
    assert refused.details["numPosted"] == "1"
    assert pair.is_paused()
    assert not pair.engine.session_open
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
