"""An engine that is taken out of service, and one that is not in service before its first update."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.inspect import SERVICE_NAME
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault, ScriptedEngine
from tests.integration.conftest import StartPair
from tests.integration.groups import (
    BEGIN,
    PAUSE,
    RESUME,
    abort,
    begin,
    ended,
    hold,
    ready,
    whole_update,
)
from tests.integration.support import ANSWER_S, Pair, refusal, wait_until


def fence(pair: Pair, reason: str = "the fleet went on", *, pause: bool = False) -> grpc.Future[pb.FenceEngineResponse]:
    return pair.rpc.FenceEngine.future(pb.FenceEngineRequest(reason=reason, pause=pause), timeout=ANSWER_S)


def fenced(pair: Pair, reason: str = "the fleet went on", *, pause: bool = False) -> None:
    pair.mark()
    fence(pair, reason, pause=pause).result(ANSWER_S)


def is_ready(pair: Pair) -> bool:
    request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    answer = health_pb2_grpc.HealthStub(pair.channel).Check(request, timeout=ANSWER_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def from_disk(pair: Pair, update_id: str) -> pb.UpdateOutcome:
    request = pb.UpdateWeightsFromDiskRequest(
        update_id=update_id, weight_version=update_id, model_path=str(pair.folder)
    )
    return pair.rpc.UpdateWeightsFromDisk(request, timeout=ANSWER_S).outcome


UPDATES: dict[str, Callable[[Pair, str], pb.UpdateOutcome]] = {
    "memory": lambda pair, name: pair.update(name),
    "group": whole_update,
    "disk": from_disk,
}


@pytest.mark.parametrize("pause", [False, True])
@pytest.mark.parametrize("way", UPDATES)
def test_an_engine_out_of_service_is_in_again_with_any_complete_update(start: StartPair, pause: bool, way: str) -> None:
    pair = start()
    version = pair.engine.weight_version
    fenced(pair, pause=pause)
    assert (pair.posts(), pair.is_paused()) == ([PAUSE] if pause else [], pause)
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_FENCED, version)
    assert status.reason == "out of service until a complete update: the fleet went on"
    wait_until(lambda: not is_ready(pair))
    assert UPDATES[way](pair, "in again").state == pb.UPDATE_STATE_COMMITTED
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_READY, False)
    wait_until(lambda: is_ready(pair))


@pytest.mark.parametrize("pause", [False, True])
def test_an_update_that_is_aborted_changes_nothing_about_that(start: StartPair, pause: bool) -> None:
    pair = start()
    fenced(pair, pause=pause)
    ready(pair, "tried")
    assert abort(pair, "tried").state == pb.UPDATE_STATE_ABORTED
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_FENCED, pause)
    assert (RESUME in pair.posts()) is not pause
    ready(pair, "died")
    hold(pair, "died").cancel()
    assert ended(pair, "died").state == pb.UPDATE_STATE_ABORTED
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_FENCED, pause)
    assert whole_update(pair, "complete").state == pb.UPDATE_STATE_COMMITTED
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_READY, False)


def test_the_last_reason_is_told_in_one_line_and_no_more_than_that(start: StartPair) -> None:
    pair = start()
    fenced(pair, "first")
    fenced(pair, "second\n\x1b[2J" + "x" * (1 << 20))
    reason = pair.status().reason
    assert reason.startswith("out of service until a complete update: second ")
    assert reason.isprintable()
    assert len(reason) < 1000
    fenced(pair, "")
    assert pair.status().reason.endswith(": no reason given")


def test_an_engine_that_was_restarted_is_fenced_no_more(start: StartPair) -> None:
    pair = start()
    fenced(pair)
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    pair.engine.restart()
    pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)


def test_nobody_is_fenced_while_an_update_is_in_hand(pair: Pair) -> None:
    ready(pair, "fenced in hand")
    refused = refusal(fence(pair))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "UPDATE_IN_PROGRESS")
    assert pair.posts() == [PAUSE, BEGIN]
    assert pair.commit("fenced in hand", 0).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_an_engine_that_cannot_be_reached_is_not_fenced(start: StartPair) -> None:
    pair = start()
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    assert refusal(fence(pair)).reason == "ENGINE_UNREACHABLE"


def test_an_engine_that_does_not_pause_is_out_of_service_all_the_same(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(PAUSE, Fault.REFUSE, message="not today")
    assert refusal(fence(pair, pause=True)).reason == "ENGINE_REFUSED"
    assert pair.status().state == pb.SIDECAR_STATE_FENCED
    assert pair.update("in again").state == pb.UPDATE_STATE_COMMITTED


def test_a_caller_that_goes_while_generation_is_paused_leaves_its_place_taken_until_that_is_over(
    start: StartPair,
) -> None:
    pair = start()
    pair.engine.fault(PAUSE, Fault.HANG)
    fencing = fence(pair, pause=True)
    wait_until(lambda: pair.engine.num_hanging == 1)
    fencing.cancel()
    assert refusal(begin(pair, "too early", tp_size=2, group_name="")).reason == "UPDATE_IN_PROGRESS"
    pair.engine.release()
    wait_until(pair.is_paused)
    assert pair.update("in again").state == pb.UPDATE_STATE_COMMITTED
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_READY, False)


def test_a_dirty_engine_that_is_fenced_stays_dirty(start: StartPair) -> None:
    pair = start()
    ready(pair, "fails", two_phase=True)
    pair.commit("fails", 0).result(ANSWER_S)
    assert abort(pair, "fails").state == pb.UPDATE_STATE_FAILED
    fenced(pair)
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
    assert pair.update("heals").state == pb.UPDATE_STATE_COMMITTED
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_where_an_update_is_required_the_first_one_brings_the_engine_into_service(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with ScriptedEngine(tp_size=2) as engine:
        pair = Pair(engine, tmp_path_factory.mktemp("pair"), ("--require-update",))
        try:
            status = pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)
            assert status.reason == "the engine has started and serves its checkpoint; send a complete update"
            assert not is_ready(pair)
            ready(pair, "aborted")
            abort(pair, "aborted")
            assert pair.status().state == pb.SIDECAR_STATE_UNSYNCED
            assert pair.update("first").state == pb.UPDATE_STATE_COMMITTED
            assert pair.status().state == pb.SIDECAR_STATE_READY
            wait_until(lambda: is_ready(pair))
        finally:
            pair.close()
