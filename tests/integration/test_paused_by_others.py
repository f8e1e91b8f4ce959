"""An engine that somebody else has paused, or that takes no requests yet."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.standing import SidecarState
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import FOREVER, Fault
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, LOAD, NO_SESSIONS, SESSIONS, Pair, failed_update, wait_until
from tests.integration.test_health import NOT_SERVING, SERVICE, SERVING, command

PAUSE, RESUME, READY = "/pause_generation", "/continue_generation", "/ready"
SHOWS_READY = (SESSIONS, NO_SESSIONS)
SILENT = "0.5.15.post1"
shows_ready = pytest.mark.parametrize("pair", SHOWS_READY, indirect=True)


@pytest.fixture(autouse=True)
def _shared_engines_go_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Also when a test ends half-way: others use them."""
    pair: Pair | None = request.getfixturevalue("pair") if "pair" in request.fixturenames else None
    yield
    if pair is not None:
        pair.engine.running_requests = 0
        by_hand(pair, RESUME)


def by_hand(pair: Pair, path: str, mode: str = "retract") -> None:
    """As an operator does, past the sidecar."""
    body = {"mode": mode} if path == PAUSE else {}
    assert requests.post(f"{pair.engine.url}{path}", json=body, timeout=ANSWER_S).ok


def health(pair: Pair) -> int:
    check = health_pb2_grpc.HealthStub(pair.channel).Check
    return int(check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=ANSWER_S).status)


def looks(pair: Pair) -> int:
    """How often the sidecar has looked at the engine."""
    return sum(call.path == "/model_info" for call in pair.engine.calls)


def after_some_looks(pair: Pair) -> None:
    seen = looks(pair)
    wait_until(lambda: looks(pair) >= seen + 2)


@shows_ready
def test_an_engine_that_was_paused_by_hand_is_not_ready_until_it_goes_on_by_hand(pair: Pair) -> None:
    version = pair.status().weight_version
    wait_until(lambda: health(pair) == SERVING)
    by_hand(pair, PAUSE)
    status = pair.wait_for(pb.SIDECAR_STATE_PAUSED)
    assert status.reason == (
        "the engine takes no requests (/ready): it starts, or was paused; a complete update lets it go on"
    )
    assert status.weight_version == version, "it holds the weights of one version all the same"
    wait_until(lambda: health(pair) == NOT_SERVING)
    by_hand(pair, RESUME)
    assert pair.wait_for(pb.SIDECAR_STATE_READY).reason == ""
    wait_until(lambda: health(pair) == SERVING)


@shows_ready
@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_a_complete_update_lets_it_go_on_and_is_ready_at_once(pair: Pair, mode: str) -> None:
    by_hand(pair, PAUSE, mode)
    pair.wait_for(pb.SIDECAR_STATE_PAUSED)
    assert pair.update(f"lets {mode} go on").state == pb.UPDATE_STATE_COMMITTED
    assert not pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_READY
    wait_until(lambda: health(pair) == SERVING)


def test_a_checkpoint_from_disk_lets_it_go_on_too(pair: Pair) -> None:
    by_hand(pair, PAUSE)
    pair.wait_for(pb.SIDECAR_STATE_PAUSED)
    request = pb.UpdateWeightsFromDiskRequest(
        update_id="lets go", weight_version="version of lets go", model_path=str(pair.folder)
    )
    pair.rpc.UpdateWeightsFromDisk(request, timeout=ANSWER_S)
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_READY, False)


def test_while_ranks_arrive_it_is_not_ready_either(pair: Pair) -> None:
    by_hand(pair, PAUSE)
    pair.wait_for(pb.SIDECAR_STATE_PAUSED)
    waiting = pair.send(pair.request("arrives"))
    assert "/ready" in pair.wait_for(pb.SIDECAR_STATE_COLLECTING).reason
    waiting.cancel()
    pair.wait_for(pb.SIDECAR_STATE_PAUSED)
    by_hand(pair, RESUME)


@pytest.mark.parametrize("pair", [SILENT], indirect=True)
def test_a_release_that_does_not_show_it_is_not_asked(pair: Pair) -> None:
    by_hand(pair, PAUSE)
    after_some_looks(pair)
    assert (pair.status().state, health(pair)) == (pb.SIDECAR_STATE_READY, SERVING)
    assert READY not in [call.path for call in pair.engine.calls]
    by_hand(pair, RESUME)


@shows_ready
def test_the_pause_of_an_update_is_none_of_somebody_elses(pair: Pair) -> None:
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("slow to load", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    after_some_looks(pair)
    status = pair.status()
    assert (status.state, status.reason, health(pair)) == (pb.SIDECAR_STATE_APPLYING, "", SERVING)
    pair.engine.release()
    for answer in answers:
        answer.result(ANSWER_S)
    assert pair.status().state == pb.SIDECAR_STATE_READY
    after_some_looks(pair)
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_dirty_engine_is_called_dirty_and_not_paused(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.CUT)
    failed_update(pair, "breaks")
    after_some_looks(pair)
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
    assert pair.update("heals").state == pb.UPDATE_STATE_COMMITTED
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_sidecar_that_starts_beside_a_paused_engine_says_so(start: StartPair) -> None:
    before = start()
    before.process.stop()
    by_hand(before, PAUSE)
    with closing(Pair(before.engine, before.folder, manager=False)) as pair:
        pair.wait_for(pb.SIDECAR_STATE_PAUSED)
        assert health(pair) == NOT_SERVING
        done = command(pair, "health")
        assert (done.returncode, "/ready" in done.stdout) == (1, True)
        assert command(pair, "status").stdout.startswith(f"state:   {SidecarState.PAUSED.name.lower()} - the engine")
        assert pair.update("lets it go on").state == pb.UPDATE_STATE_COMMITTED
        assert pair.status().state == pb.SIDECAR_STATE_READY


def test_only_an_engine_that_says_no_takes_no_requests(start: StartPair) -> None:
    """A server without the path (a fork, a proxy before it) has not said that it is paused."""
    pair = start()
    pair.engine.fault(READY, Fault.REFUSE, status=404, times=FOREVER)
    after_some_looks(pair)
    assert (pair.status().state, health(pair)) == (pb.SIDECAR_STATE_READY, SERVING)


def test_requests_that_somebody_froze_are_not_waited_for_by_an_abort_that_could_not_end(pair: Pair) -> None:
    """On top of a pause in place, SGLang's "abort" waits for ever and takes /continue_generation with it."""
    pair.engine.running_requests = 1
    by_hand(pair, PAUSE, "in_place")
    pair.wait_for(pb.SIDECAR_STATE_PAUSED)
    pair.mark()
    aborting = [pair.request("aborts", rank) for rank in range(2)]
    for request in aborting:
        request.update.pause_mode = pb.PAUSE_MODE_ABORT
    for answer in [pair.send(request) for request in aborting]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    pair.engine.running_requests = 0
    assert pair.bodies(PAUSE) == [{"mode": "retract"}]


def test_a_pause_that_the_sidecar_has_not_seen_yet_is_looked_for_before_an_abort(pair: Pair) -> None:
    pair.engine.running_requests = 1
    requests_of_ranks = [pair.request("aborts at once", rank) for rank in range(2)]
    for request in requests_of_ranks:
        request.update.pause_mode = pb.PAUSE_MODE_ABORT
    by_hand(pair, PAUSE, "in_place")
    pair.mark()
    for answer in [pair.send(request) for request in requests_of_ranks]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert pair.bodies(PAUSE) == [{"mode": "retract"}]


def test_readiness_follows_an_engine_that_starts_up(start: StartPair) -> None:
    """It answers /model_info before it is warm, and /ready says 503 until then."""
    pair = start()
    pair.engine.die()
    wait_until(lambda: pair.status().state == pb.SIDECAR_STATE_ENGINE_UNREACHABLE)
    pair.engine.restart()
    pair.engine.fault(READY, Fault.REFUSE, status=503, times=FOREVER)
    pair.update("first")
    pair.wait_for(pb.SIDECAR_STATE_PAUSED)
    wait_until(lambda: health(pair) == NOT_SERVING)
    pair.engine.forget_faults()
    pair.wait_for(pb.SIDECAR_STATE_READY)
    wait_until(lambda: health(pair) == SERVING)


def test_an_update_that_ends_just_after_a_look_at_the_pause_is_ready_all_the_same(start: StartPair) -> None:
    """An answer of /ready that is older than the end of the pause says nothing."""
    pair = start()
    pair.engine.fault(READY, Fault.LATE, delay_s=1.0, times=2)
    for number in range(2):
        pair.engine.fault(LOAD, Fault.LATE, delay_s=0.4)
        pair.update(f"{number}")
        seen = set()
        give_up = time.monotonic() + 1.2
        while time.monotonic() < give_up:
            seen.add(pair.status().state)
            time.sleep(0.02)
        assert seen == {pb.SIDECAR_STATE_READY}
