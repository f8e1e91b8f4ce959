"""Engines, trainers and sidecars that go and come back in the middle of an update."""

import os
import signal
import time
from contextlib import closing

import pytest
import torch

from adapter import SidecarUnreachable, WeightSyncClient
from adapter.launch import SidecarConfig, SidecarProcess
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, NO_SESSIONS, SESSIONS, Pair, failed_call, refusal, wait_until


def restart_engine(pair: Pair) -> None:
    """Long enough for the sidecar to notice."""
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    pair.engine.restart()
    wait_until(lambda: pair.status().HasField("engine"))


@pytest.mark.parametrize(
    ("release", "server_info"),
    [(SESSIONS, {}), (NO_SESSIONS, {}), (NO_SESSIONS, {"random_seed": 42})],
    ids=[SESSIONS, NO_SESSIONS, "the-same-seed"],
)
def test_an_engine_that_restarts_in_the_middle_never_gets_the_rest_of_an_update(
    start: StartPair, release: str, server_info: dict[str, object]
) -> None:
    pair = start(release=release, server_info=server_info)
    pair.begin("cut in two", num_buckets=2)
    for push in [pair.push("cut in two", rank, 0) for rank in range(2)]:
        push.result(20)
    restart_engine(pair)
    pair.mark()
    pushes = [pair.push("cut in two", rank, 1) for rank in range(2)]
    assert {refusal(push).reason for push in pushes} == {"ENGINE_RESTARTED"}
    assert LOAD not in pair.posts()
    assert pair.outcome("cut in two").state == pb.UPDATE_STATE_ABORTED
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_UNSYNCED, False)
    assert pair.update("complete").state == pb.UPDATE_STATE_COMMITTED
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_restarted_engine_is_ready_at_once_where_its_checkpoint_is_accepted(start: StartPair) -> None:
    pair = start("--accept-checkpoint-weights")
    restart_engine(pair)
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_dirt_goes_with_the_engine_that_had_it(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.DIE)
    answers = [pair.send(pair.request("dies", rank)) for rank in range(2)]
    assert {refusal(answer).reason for answer in answers} == {"ENGINE_LOST"}
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_ENGINE_UNREACHABLE, "")
    pair.engine.restart()
    pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)
    assert pair.status().weight_version == "default"


def test_memory_of_a_trainer_that_went_while_generation_was_being_paused_is_never_posted(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/pause_generation", Fault.HANG)
    leaves, stays = (pair.send(pair.request("left", rank)) for rank in range(2))
    pair.wait_for(pb.SIDECAR_STATE_APPLYING)
    assert leaves.cancel()
    time.sleep(0.2)  # the cancellation reaches the sidecar long before the engine answers
    pair.engine.release()
    refused = refusal(stays)
    assert refused.reason == "UPDATE_ABORTED"
    assert "rank 0 cancelled its call, or died" in refused.message
    assert LOAD not in pair.posts()
    assert not pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_memory_that_is_gone_when_its_turn_comes_is_not_posted(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/pause_generation", Fault.HANG)
    answers = [pair.send(pair.request("vanished", rank)) for rank in range(2)]
    pair.wait_for(pb.SIDECAR_STATE_APPLYING)
    pair.forget_memory()
    pair.engine.release()
    for answer in answers:
        refused = refusal(answer)
        assert refused.reason == "INVALID_HANDLE"
        assert "rank 0, bucket 0: shared memory: cannot see /torch_" in refused.message
    assert LOAD not in pair.posts()
    assert not pair.is_paused()


def test_a_sidecar_that_was_killed_in_the_middle_leaves_word_to_its_successor(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("orphaned", rank)) for rank in range(2)]
    pair.wait_for(pb.SIDECAR_STATE_APPLYING)
    wait_until(lambda: LOAD in pair.posts())
    os.kill(pair.process.pid, signal.SIGKILL)
    for answer in answers:
        failed_call(answer)
    pair.process.stop()
    pair.engine.release()
    with closing(Pair(pair.engine, pair.folder, manager=False)) as successor:
        status = successor.wait_for(pb.SIDECAR_STATE_DIRTY)
        assert "a sidecar before this one ended while it applied update 'orphaned'" in status.reason
        assert status.weight_version == ""
        assert successor.update("complete").state == pb.UPDATE_STATE_COMMITTED
        assert successor.status().state == pb.SIDECAR_STATE_READY
        assert not (pair.folder / "sidecar.sock.journal").exists()
        assert not successor.is_paused()


@pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS])
def test_a_sidecar_that_was_killed_before_the_first_bucket_is_undone_by_its_successor(
    start: StartPair, release: str
) -> None:
    pair = start(release=release)
    held_at = "/begin_weight_update" if release == SESSIONS else "/pause_generation"
    pair.engine.fault(held_at, Fault.HANG)
    answers = [pair.send(pair.request("orphaned", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    os.kill(pair.process.pid, signal.SIGKILL)
    for answer in answers:
        failed_call(answer)
    pair.process.stop()
    pair.engine.release()
    wait_until(pair.is_paused)
    with closing(Pair(pair.engine, pair.folder, manager=False)) as successor:
        successor.wait_for(pb.SIDECAR_STATE_READY)
        assert not successor.is_paused()
        assert not pair.engine.session_open
        assert successor.status().weight_version == "default"
        assert not (pair.folder / "sidecar.sock.journal").exists()


def test_a_sidecar_that_is_down_costs_a_trainer_no_memory(start: StartPair) -> None:
    pair = start(tp_size=1)
    with WeightSyncClient(pair.target, rank=0, tp_size=1, restart_patience=0.0) as client:
        client.update_weights([("a", torch.zeros(64))], version="1", timeout=10)
        pair.process.stop()
        for _ in range(3):
            with pytest.raises(SidecarUnreachable):
                client.update_weights([("a", torch.zeros(64))], version="2", timeout=10)
            assert client.unreleased_bytes == 0
        config = SidecarConfig(engine_url=pair.engine.url, listen=pair.target, log_path=pair.folder / "again.log")
        with SidecarProcess(config):
            client.wait_ready(10)
            assert client.update_weights([("a", torch.zeros(64))], version="2", timeout=10).weight_version == "2"


def test_an_update_that_was_being_collected_is_given_up_when_the_engine_restarts(start: StartPair) -> None:
    pair = start()
    waiting = pair.send(pair.request("half here", 0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    restart_engine(pair)
    refused = refusal(waiting)
    assert refused.reason == "ENGINE_RESTARTED"
    assert "was restarted while ranks arrived" in refused.message
    assert LOAD not in pair.posts()
    assert pair.update("half here").state == pb.UPDATE_STATE_COMMITTED


def test_a_restart_while_ranks_are_waited_for_leaves_no_dirt_on_the_new_server(start: StartPair) -> None:
    pair = start("--bucket-timeout", "8", release=NO_SESSIONS)
    pair.begin("waits", num_buckets=2)
    for push in [pair.push("waits", rank, 0) for rank in range(2)]:
        push.result(20)
    restart_engine(pair)
    wait_until(lambda: pair.outcome("waits").state == pb.UPDATE_STATE_ABORTED)
    status = pair.status()
    assert (status.state, pair.is_paused()) == (pb.SIDECAR_STATE_UNSYNCED, False)


def test_a_version_that_broke_off_after_it_was_published_may_be_sent_again(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/continue_generation", Fault.REFUSE, times=3)
    answers = [pair.send(pair.request("once more", rank)) for rank in range(2)]
    assert {refusal(answer).reason for answer in answers} == {"UPDATE_FAILED"}
    assert pair.engine.weight_version == "version of once more"
    assert pair.update("once more").state == pb.UPDATE_STATE_COMMITTED
    assert not pair.is_paused()
