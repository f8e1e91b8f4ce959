"""What happens to requests in flight, by pause mode and release, and what the outcome says of the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeAlias

import grpc
import pytest
import requests

from sidecar.applier import NOT_FLUSHED
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import (
    ANSWER_S,
    LOAD,
    NO_SESSIONS,
    SESSIONS,
    Pair,
    Refusal,
    expected_posts,
    header,
    manifest,
    refusal,
    wait_until,
)

OLDEST = "0.5.15.post1"
PAUSE, FLUSH, RESUME = "/pause_generation", "/flush_cache", "/continue_generation"
PUBLISH = "/update_weight_version"
DRAIN, NONE = pb.PAUSE_MODE_DRAIN, pb.PAUSE_MODE_NONE
both_kinds = pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)
every_release = pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS, OLDEST], indirect=True)

Answers: TypeAlias = "list[grpc.Future[pb.UpdateWeightsResponse]]"


def send(
    pair: Pair, update_id: str, mode: pb.PauseMode.ValueType, num_buckets: int = 1, timeout_s: float = ANSWER_S
) -> Answers:
    """Both ranks' calls."""
    whole = [pair.request(update_id, rank, num_buckets=num_buckets) for rank in range(2)]
    for request in whole:
        request.update.pause_mode = mode
    return [pair.send(request, timeout_s) for request in whole]


def committed(answers: Answers) -> pb.UpdateOutcome:
    first, second = [answer.result(ANSWER_S).outcome for answer in answers]
    assert first == second
    assert first.state == pb.UPDATE_STATE_COMMITTED
    return first


def refused(answers: Answers) -> Refusal:
    first, second = [refusal(answer) for answer in answers]
    assert first == second
    return first


@contextmanager
def in_flight(pair: Pair, number: int) -> Iterator[None]:
    """Requests that the engine decodes, and that end with the block at the latest."""
    pair.engine.running_requests = number
    try:
        yield
    finally:
        pair.engine.running_requests = 0


def is_drained(pair: Pair) -> bool:
    """Whether the sidecar waits for an idle engine now."""
    return any(call.path == FLUSH and "timeout" in call.query for call in pair.engine.calls[pair._mark :])


def modes(pair: Pair) -> list[str]:
    return [body["mode"] for body in pair.bodies(PAUSE)]


def assert_untouched(pair: Pair) -> None:
    """As before the update: nothing loaded, generation goes on."""
    assert LOAD not in pair.posts()
    assert PUBLISH not in pair.posts()
    assert (pair.is_paused(), pair.engine.session_open) == (False, False)
    assert set(pair.counts()) == {2}, "the engine never opened the memory"
    assert pair.status().state == pb.SIDECAR_STATE_READY


# SGLang's own modes.


@every_release
@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_what_a_pause_does_to_requests_and_to_the_cache(pair: Pair, mode: str, request: pytest.FixtureRequest) -> None:
    release = request.node.callspec.params["pair"]
    aborted = pair.engine.aborted_requests
    with in_flight(pair, 2):
        outcome = committed(send(pair, mode, pb.PauseMode.Value(f"PAUSE_MODE_{mode.upper()}")))
        kept = pair.engine.running_requests
    flushed = mode == "abort" or (mode == "retract" and release == SESSIONS)
    assert outcome.cache_flushed is flushed
    assert list(outcome.notes) == ([] if flushed else [NOT_FLUSHED])
    assert (kept, pair.engine.aborted_requests - aborted) == ((0, 2) if mode == "abort" else (2, 0))
    assert modes(pair) == [mode]
    assert not pair.is_paused()
    assert pair.engine.weight_version == f"version of {mode}"


def test_a_mode_that_is_not_chosen_is_retract(pair: Pair) -> None:
    committed(send(pair, "not chosen", pb.PAUSE_MODE_UNSPECIFIED))
    assert modes(pair) == ["retract"]


def test_ranks_that_want_another_pause_differ(pair: Pair) -> None:
    first, second = (pair.request("differ in mode", rank) for rank in range(2))
    second.update.pause_mode = DRAIN
    waiting = pair.send(first)
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    assert refusal(pair.send(second)).reason == "RANKS_DIFFER"
    assert "pause_mode" in refusal(waiting).message
    pair.assert_untouched()


# Drain.


@every_release
def test_a_drain_of_an_idle_engine_waits_for_nothing(pair: Pair, request: pytest.FixtureRequest) -> None:
    outcome = committed(send(pair, "idle", DRAIN, num_buckets=2))
    assert (outcome.cache_flushed, list(outcome.notes)) == (True, [])
    kind = SESSIONS if request.node.callspec.params["pair"] == SESSIONS else NO_SESSIONS
    pause, *rest = expected_posts(kind, 2)
    assert pair.posts() == [pause, FLUSH, *rest]
    assert modes(pair) == ["in_place"]


@both_kinds
def test_a_drain_waits_for_requests_while_they_run_and_pauses_when_none_does(pair: Pair) -> None:
    aborted = pair.engine.aborted_requests
    with in_flight(pair, 2):
        answers = send(pair, "drained", DRAIN)
        wait_until(lambda: is_drained(pair))
        assert not pair.is_paused(), "requests go on while they are waited for"
        assert LOAD not in pair.posts()
        assert pair.status().state == pb.SIDECAR_STATE_APPLYING
        pair.engine.running_requests = 1
        assert not any(answer.done() for answer in answers)
    outcome = committed(answers)
    assert (outcome.cache_flushed, list(outcome.notes)) == (True, [])
    assert set(modes(pair)) == {"in_place"}
    last_pause = len(pair.posts()) - 1 - pair.posts()[::-1].index(PAUSE)
    assert RESUME not in pair.posts()[last_pause : pair.posts().index(LOAD)]
    assert (pair.engine.aborted_requests, pair.engine.waiting_requests) == (aborted, 0)
    assert not pair.is_paused()


@pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS])
def test_clients_of_a_drained_engine_get_all_their_tokens_from_one_version(start: StartPair, release: str) -> None:
    pair = start(release=release, token_s=0.01)

    def generate(number: int) -> dict[str, object]:
        body = {"input_ids": [number], "sampling_params": {"max_new_tokens": 60}}
        meta = requests.post(f"{pair.engine.url}/generate", json=body, timeout=ANSWER_S).json()["meta_info"]
        return {"finish": meta["finish_reason"]["type"], "versions": [s["version"] for s in meta["weight_versions"]]}

    with ThreadPoolExecutor(4) as clients:
        before = [clients.submit(generate, number) for number in range(3)]
        wait_until(lambda: pair.engine.running_requests == 3)
        outcome = committed(send(pair, "for clients", DRAIN))
        after = generate(9)
    assert outcome.cache_flushed
    assert [one.result() for one in before] == [{"finish": "length", "versions": ["default"]}] * 3
    assert after == {"finish": "length", "versions": ["version of for clients"]}


@pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS])
def test_a_drain_that_outlasts_the_pause_time_out_is_given_up_with_the_engine_untouched(
    start: StartPair, release: str
) -> None:
    pair = start("--pause-timeout", "0.5", release=release)
    with in_flight(pair, 1):
        busy = refused(send(pair, "too busy", DRAIN))
        assert (busy.code, busy.reason) == (grpc.StatusCode.ABORTED, "ENGINE_BUSY")
        assert f"the engine at {pair.engine.url} still had requests in flight after 0.5 s" in busy.message
        assert pair.outcome("too busy").state == pb.UPDATE_STATE_ABORTED
        assert_untouched(pair)
        assert (pair.engine.running_requests, pair.engine.aborted_requests) == (1, 0)
    pair.forget_memory()
    assert committed(send(pair, "too busy", DRAIN)).cache_flushed


def test_a_drain_is_given_up_when_its_callers_deadline_passes(start: StartPair) -> None:
    pair = start()
    with in_flight(pair, 1):
        for answer in send(pair, "impatient", DRAIN, timeout_s=2.5):
            assert refusal(answer).reason in ("ENGINE_BUSY", "STILL_APPLYING")
        wait_until(lambda: pair.outcome("impatient").state == pb.UPDATE_STATE_ABORTED, timeout_s=5.0)
        outcome = pair.outcome("impatient")
        assert (outcome.error_reason, outcome.num_posted) == ("ENGINE_BUSY", 0)
        assert_untouched(pair)


def test_a_deadline_that_passes_at_the_very_end_of_a_drain_leaves_the_engine_untouched(start: StartPair) -> None:
    """The engine is idle and paused, and nobody waits any more when the session would be opened."""
    pair = start()
    pair.engine.fault(FLUSH, Fault.LATE, delay_s=4.0)
    for answer in send(pair, "too late", DRAIN, timeout_s=2.5):
        assert refusal(answer).reason == "STILL_APPLYING"
    wait_until(lambda: pair.outcome("too late").state > pb.UPDATE_STATE_APPLYING)
    outcome = pair.outcome("too late")
    assert outcome.state == pb.UPDATE_STATE_ABORTED, outcome.error
    assert_untouched(pair)


def test_a_caller_that_goes_while_the_engine_is_drained_ends_the_update(start: StartPair) -> None:
    pair = start()
    with in_flight(pair, 1):
        leaves, stays = send(pair, "left", DRAIN)
        wait_until(lambda: is_drained(pair))
        leaves.cancel()
        time.sleep(0.2)  # the cancellation reaches the sidecar before the requests end
    assert refusal(stays).reason == "UPDATE_ABORTED"
    assert_untouched(pair)


@pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS])
def test_a_drain_of_a_dirty_engine_does_not_wait_for_requests_that_cannot_end(start: StartPair, release: str) -> None:
    pair = start(release=release)
    pair.engine.fault(LOAD, Fault.CUT)
    with in_flight(pair, 1):
        assert refused(send(pair, "breaks", pb.PAUSE_MODE_RETRACT)).reason == "UPDATE_FAILED"
        pair.mark()
        outcome = committed(send(pair, "heals", DRAIN))  # within ANSWER_S, where a pause may take 60 s
        assert modes(pair) == ["retract"]
        assert outcome.cache_flushed is (release == SESSIONS)
        assert (pair.is_paused(), pair.engine.running_requests) == (False, 1)


# None.


def test_one_bucket_without_a_pause_carries_its_version(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS)
    outcome = committed(send(pair, "unpaused", NONE))
    assert PAUSE not in pair.posts()
    assert PUBLISH not in pair.posts()
    (body,) = pair.bodies(LOAD)
    assert (body["weight_version"], body["flush_cache"]) == ("version of unpaused", False)
    assert "selector" not in body
    assert pair.engine.weight_version == pair.status().weight_version == "version of unpaused"
    assert outcome.cache_flushed
    assert pb.PHASE_PUBLISH not in [phase.phase for phase in outcome.phases]


def test_an_update_with_a_pause_never_carries_its_version(pair: Pair) -> None:
    committed(send(pair, "paused", pb.PAUSE_MODE_RETRACT))
    assert "weight_version" not in pair.bodies(LOAD)[0]


@pytest.mark.parametrize("pair", [NO_SESSIONS, OLDEST], indirect=True)
def test_several_buckets_or_a_checkpoint_without_a_pause_are_refused(pair: Pair) -> None:
    two, _ = [refusal(answer) for answer in send(pair, "two buckets", NONE, num_buckets=2)]
    assert (two.code, two.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PAUSE_MODE_UNSUITABLE")
    assert "this is 2 buckets" in two.message
    begin = pb.BeginUpdateRequest(
        update=header("begun", 0), manifest=pb.ManifestReference(manifest=manifest(num_buckets=2))
    )
    begin.update.pause_mode = NONE
    assert refusal(pair.rpc.BeginUpdate.future(begin, timeout=ANSWER_S)).reason == "PAUSE_MODE_UNSUITABLE"
    disk = pb.UpdateWeightsFromDiskRequest(update_id="disk", weight_version="d", model_path="/m", pause_mode=NONE)
    refusal_of_disk = refusal(pair.rpc.UpdateWeightsFromDisk.future(disk, timeout=ANSWER_S))
    assert refusal_of_disk.reason == "PAUSE_MODE_UNSUITABLE"
    assert "this is a load from disk" in refusal_of_disk.message
    pair.assert_untouched()


@pytest.mark.parametrize("num_buckets", [1, 2])
def test_an_idle_engine_with_sessions_takes_an_update_that_meets_no_request(pair: Pair, num_buckets: int) -> None:
    outcome = committed(send(pair, f"idle {num_buckets}", NONE, num_buckets=num_buckets))
    pause, *rest = expected_posts(SESSIONS, num_buckets)
    assert pair.posts() == [pause, FLUSH, *rest]
    assert modes(pair) == ["in_place"]
    assert outcome.cache_flushed


def test_a_busy_engine_with_sessions_refuses_at_once_what_may_meet_no_request(start: StartPair) -> None:
    pair = start()
    with in_flight(pair, 1):
        started = time.monotonic()
        busy = refused(send(pair, "busy", NONE))
        assert (busy.code, busy.reason) == (grpc.StatusCode.ABORTED, "ENGINE_BUSY")
        assert time.monotonic() - started < 10.0, "nothing is waited for"
        assert not is_drained(pair)
        assert_untouched(pair)
        assert pair.engine.running_requests == 1


def test_a_bucket_without_a_pause_whose_answer_was_lost_is_known_by_its_version(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS)
    pair.engine.fault(LOAD, Fault.LOSE_REPLY)
    outcome = committed(send(pair, "lost", NONE))
    assert list(outcome.notes) == ["the answer to the load of bucket 0 was lost; every rank had loaded it"]
    assert (pair.posts().count(LOAD), PAUSE in pair.posts(), PUBLISH in pair.posts()) == (1, False, False)
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_READY, "version of lost")
    assert status.engine.epoch == 1


def test_a_bucket_without_a_pause_that_may_have_been_written_holds_generation(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS)
    pair.engine.fault(LOAD, Fault.CUT)
    assert refused(send(pair, "cut", NONE)).reason == "UPDATE_FAILED"
    assert pair.is_paused()
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_DIRTY, "")
    pair.mark()
    assert committed(send(pair, "heals", NONE)).weight_version == "version of heals"
    assert not pair.is_paused()
    assert pair.status().weight_version == "version of heals"


def test_a_bucket_without_a_pause_that_the_engine_refuses_leaves_it_running(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS)
    pair.engine.fault(LOAD, Fault.REFUSE, message="not these")
    assert refused(send(pair, "refused", NONE)).reason == "ENGINE_REFUSED"
    assert pair.outcome("refused").state == pb.UPDATE_STATE_ABORTED
    assert PAUSE not in pair.posts()
    assert PUBLISH not in pair.posts()
    assert not pair.is_paused()
    assert set(pair.counts()) == {2}, "the engine never opened the memory"
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_bucket_that_waited_for_requests_too_long_never_overwrites_a_later_version(start: StartPair) -> None:
    """Unpaused, SGLang lets a bucket wait for requests without limit, and /server_info does not wait behind it."""
    pair = start("--load-timeout", "0.5", "--probe-timeout", "0.5", release=NO_SESSIONS)
    with in_flight(pair, 1):
        outcome = committed(send(pair, "waits", NONE))
        assert "requests in flight were ended, since the bucket waited for them for too long" in outcome.notes
        assert committed(send(pair, "heals", pb.PAUSE_MODE_RETRACT)).weight_version == "version of heals"
    time.sleep(0.5)  # what still waited in the engine has had its turn by now
    assert pair.engine.weight_version == "version of heals"
