"""An engine that refuses, loses answers or dies: what is undone, what stays paused, and what heals it."""

import grpc
import pytest
import requests

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import (
    ANSWER_S,
    LOAD,
    SESSIONS,
    Pair,
    expected_posts,
    failed_update,
    refusal,
    wait_until,
)

PUBLISH = "/update_weight_version"
PAUSE, RESUME = "/pause_generation", "/continue_generation"
BEGIN, END = "/begin_weight_update", "/end_weight_update"
PROBE = "/update_weights_from_distributed"


@pytest.mark.parametrize(
    ("path", "fault", "posts"),
    [
        (PAUSE, Fault.REFUSE, [PAUSE, RESUME]),
        (PAUSE, Fault.LOSE_REPLY, [PAUSE, RESUME]),
        (PAUSE, Fault.CUT, [PAUSE, RESUME]),
        (BEGIN, Fault.REFUSE, [PAUSE, BEGIN, END, RESUME]),
        (BEGIN, Fault.CUT, [PAUSE, BEGIN, PROBE, END, RESUME]),
    ],
)
def test_an_engine_that_fails_before_the_first_bucket_is_left_as_it_was(
    pair: Pair, path: str, posts: list[str], fault: Fault
) -> None:
    name = f"{fault.name} {path}"
    pair.engine.fault(path, fault, message="not now")
    refused = failed_update(pair, name)
    if fault is Fault.REFUSE:
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_REFUSED")
        assert refused.message == f"the engine at {pair.engine.url} answered 400 to {path}: not now"
    else:
        assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_LOST")
        assert path in refused.message
    assert pair.posts() == posts
    assert not pair.is_paused()
    assert not pair.engine.session_open
    assert pair.outcome(name).state == pb.UPDATE_STATE_ABORTED
    assert pair.counts() == [2, 2]  # the engine never opened the memory
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_session_that_somebody_left_open_is_ended_first(pair: Pair) -> None:
    requests.post(f"{pair.engine.url}{BEGIN}", json={}, timeout=ANSWER_S)
    assert pair.engine.session_open
    pair.mark()
    assert pair.update("finds a session").state == pb.UPDATE_STATE_COMMITTED
    begin = ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]
    assert pair.posts()[:4] == ["/pause_generation", *begin]


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.CUT], ids=lambda fault: fault.name)
def test_a_load_that_breaks_off_leaves_the_engine_paused_and_the_next_update_heals_it(
    start: StartPair, fault: Fault
) -> None:
    pair = start()
    pair.engine.fault(LOAD, fault, after=1, message="half a tensor")
    refused = failed_update(pair, "breaks", num_buckets=3)
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "UPDATE_FAILED")
    assert "broke off in phase load at bucket 1 of 3 after the engine was touched" in refused.message
    assert "ranks 0-1" in refused.message
    assert "generation stays paused until a complete update is loaded" in refused.message
    cause = "ENGINE_REFUSED" if fault is Fault.REFUSE else "ENGINE_LOST"
    assert (refused.details["cause"], refused.details["numPosted"]) == (cause, "2")
    assert pair.posts() == [PAUSE, BEGIN, LOAD, LOAD, END]
    assert pair.is_paused()
    status = pair.status()
    assert (status.state, status.reason, status.weight_version) == (pb.SIDECAR_STATE_DIRTY, refused.message, "")
    assert pair.outcome("breaks").num_posted == 2
    pair.mark()
    assert pair.update("heals").state == pb.UPDATE_STATE_COMMITTED
    assert pair.posts() == expected_posts(SESSIONS, 1)
    assert not pair.is_paused()
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_READY, "version of heals")


def test_an_update_after_a_failed_one_is_paused_for_but_never_by_an_abort_that_could_not_end(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.CUT)
    failed_update(pair, "breaks")
    pair.mark()
    aborting = [pair.request("heals", rank) for rank in range(2)]
    for request in aborting:
        request.update.pause_mode = pb.PAUSE_MODE_ABORT
    for answer in [pair.send(request) for request in aborting]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert pair.bodies("/pause_generation") == [{"mode": "retract"}]


def test_an_incomplete_update_does_not_heal(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.CUT)
    failed_update(pair, "breaks")
    assert refusal(pair.send(pair.request("one rank"), timeout_s=2.5)).reason == "RANKS_MISSING"
    pair.engine.fault("/pause_generation", Fault.REFUSE)
    failed_update(pair, "refused")
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
    assert pair.is_paused(), "a dirty engine must not generate, whatever became of the update after"


@pytest.mark.parametrize(
    ("path", "fault", "times"),
    [
        (PUBLISH, Fault.LOSE_REPLY, 1),  # the version itself tells that it was set
        (PUBLISH, Fault.CUT, 2),
        (PUBLISH, Fault.REFUSE, 2),
        ("/flush_cache", Fault.LOSE_REPLY, 2),
        ("/flush_cache", Fault.CUT, 2),
        (RESUME, Fault.LOSE_REPLY, 2),
        (RESUME, Fault.CUT, 2),
        (RESUME, Fault.REFUSE, 2),
    ],
)
def test_a_call_that_can_be_repeated_is_when_its_answer_is_lost(
    pair: Pair, path: str, fault: Fault, times: int
) -> None:
    pair.engine.fault(path, fault)
    assert pair.update(f"{fault.name} {path}").state == pb.UPDATE_STATE_COMMITTED
    assert pair.posts().count(path) == times
    assert pair.posts().count(LOAD) == 1
    assert not pair.is_paused()


def test_a_slow_load_is_waited_for_and_one_beyond_its_limit_is_not(start: StartPair) -> None:
    pair = start("--load-timeout", "0.6", "--probe-timeout", "0.5", "--session-timeout", "0.5")
    pair.engine.fault(LOAD, Fault.LATE, delay_s=0.3)
    assert pair.update("slow").state == pb.UPDATE_STATE_COMMITTED
    pair.engine.fault(LOAD, Fault.HANG)
    refused = failed_update(pair, "slower")
    pair.engine.release()
    wait_until(lambda: set(pair.counts()) == {1})  # it goes on, and reads the memory
    assert refused.reason == "UPDATE_FAILED"
    assert "no answer within 0.6 s; whether it was carried out is unknown" in refused.message
    assert pair.is_paused()


@pytest.mark.parametrize("fault", [Fault.DIE, Fault.HALF_LOAD, Fault.DIE_AFTER], ids=lambda fault: fault.name)
def test_an_engine_that_dies_in_a_load_takes_the_dirt_with_it_and_its_successor_is_healed(
    start: StartPair, fault: Fault
) -> None:
    pair = start()
    pair.engine.fault(LOAD, fault)
    refused = failed_update(pair, "fatal")
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "ENGINE_LOST")
    assert "the connection broke before an answer came" in refused.message
    assert "it has died since" in refused.message
    outcome = pair.outcome("fatal")
    assert (outcome.state, outcome.num_posted) == (pb.UPDATE_STATE_ABORTED, 1)
    assert pair.status().state == pb.SIDECAR_STATE_ENGINE_UNREACHABLE
    pair.engine.restart()
    pair.mark()
    assert pair.update("successor").state == pb.UPDATE_STATE_COMMITTED
    assert pair.posts() == expected_posts(SESSIONS, 1)
    assert pair.wait_for(pb.SIDECAR_STATE_READY).weight_version == "version of successor"


def test_an_engine_that_dies_between_pause_and_load_leaves_the_memory_unseen(start: StartPair) -> None:
    pair = start(release="0.5.20")
    pair.engine.fault("/pause_generation", Fault.DIE_AFTER)
    refused = failed_update(pair, "dies paused")
    assert refused.reason == "ENGINE_LOST"
    assert pair.outcome("dies paused").num_posted == 0
    assert pair.counts() == [2, 2]
    pair.engine.restart()
    assert pair.update("after").state == pb.UPDATE_STATE_COMMITTED


def test_a_version_that_another_client_set_is_seen(pair: Pair) -> None:
    body = {"new_version": "by hand", "abort_all_requests": False}
    requests.post(f"{pair.engine.url}/update_weight_version", json=body, timeout=ANSWER_S)
    wait_until(lambda: pair.status().weight_version == "by hand")
