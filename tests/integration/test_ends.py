"""Trainers that die, updates that are given up late, and sidecars that end or cannot begin."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch

from adapter import UpdateFailed, UpdateStillApplying, WeightSyncClient, WeightSyncError, wire
from adapter.launch import SidecarConfig, SidecarProcess, free_port
from adapter.planner import TensorSpec, plan
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, Pair, manifest, refusal, wait_until
from tests.integration.support import header as header_of
from tests.integration.test_process import exit_code, serve

RANK = """
import sys, grpc
from sidecar.v1 import weight_sync_pb2 as pb, weight_sync_pb2_grpc as rpc
request = pb.UpdateWeightsRequest.FromString(sys.stdin.buffer.read())
rpc.WeightSyncServiceStub(grpc.insecure_channel(sys.argv[1])).UpdateWeights(request, timeout=60)
"""


@contextmanager
def rank_process(pair: Pair, request: pb.UpdateWeightsRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer's rank as a process of its own, which makes one call."""
    with subprocess.Popen([sys.executable, "-c", RANK, pair.target], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(request.SerializeToString())
        process.stdin.close()
        try:
            yield process
        finally:
            process.kill()


def test_memory_of_a_killed_trainer_is_never_posted(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/pause_generation", Fault.HANG)
    stays = pair.send(pair.request("killed", 0))
    with rank_process(pair, pair.request("killed", 1)) as trainer:
        wait_until(lambda: pair.engine.num_hanging == 1)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    time.sleep(0.2)  # the kernel closes its connection at once; the sidecar hears of it before the engine answers
    pair.engine.release()
    refused = refusal(stays)
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "UPDATE_ABORTED")
    assert "rank 1 cancelled its call, or died, before the engine had its memory" in refused.message
    assert LOAD not in pair.posts()
    assert not pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_READY
    assert pair.update("killed").state == pb.UPDATE_STATE_COMMITTED


def test_an_id_whose_update_failed_may_be_used_again_and_one_that_was_committed_may_not(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.CUT)
    for answer in [pair.send(pair.request("once more", rank)) for rank in range(2)]:
        assert refusal(answer).reason == "UPDATE_FAILED"
    pair.begin("once more", num_buckets=1)
    pushes = [pair.push("once more", rank, 0) for rank in range(2)]
    for push in pushes:
        push.result(20)
    for commit in [pair.commit("once more", rank) for rank in range(2)]:
        assert commit.result(20).outcome.state == pb.UPDATE_STATE_COMMITTED
    pair.mark()
    reference = pb.ManifestReference(manifest=manifest(1))
    begin = pb.BeginUpdateRequest(update=header_of("once more", 0), manifest=reference)
    for late in (pair.push("once more", 0, 0), pair.rpc.BeginUpdate.future(begin, timeout=5)):
        refused = refusal(late)
        assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED")
    pair.assert_untouched()


def test_an_engine_that_will_not_go_on_is_dirty_and_not_called_restored(start: StartPair) -> None:
    pair = start(tp_size=1)
    pair.engine.fault("/begin_weight_update", Fault.REFUSE, message="no")
    pair.engine.fault("/continue_generation", Fault.REFUSE, times=3)
    refused = refusal(pair.send(pair.request("stuck", tp_size=1)))
    assert refused.reason == "UPDATE_FAILED"
    assert refused.details["numPosted"] == "0"
    assert pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
    assert pair.update("heals", tp_size=1).state == pb.UPDATE_STATE_COMMITTED
    assert not pair.is_paused()


def test_a_commit_that_ends_without_success_is_an_abort_for_all_ranks(start: StartPair) -> None:
    """Or the engine would stay paused for the other ranks until the bucket's time-out."""
    pair = start()
    with WeightSyncClient(pair.target, rank=0, tp_size=2, bucket_bytes=64) as client:
        planned = plan([TensorSpec(name, torch.float32, (16,)) for name in "ab"], 64)
        reference = pb.ManifestReference(manifest=wire.manifest(planned))
        pair.rpc.BeginUpdate(pb.BeginUpdateRequest(update=header_of("halves", 1), manifest=reference), timeout=5)
        pushes = [pair.push("halves", 1, bucket) for bucket in range(2)]
        tensors = [(name, torch.zeros(16)) for name in "ab"]
        with pytest.raises(UpdateStillApplying):
            client.update_weights(tensors, version="version of halves", update_id="halves", timeout=2.0)
        for push in pushes:
            push.result(20)
        outcome = client.get_update("halves")
        assert (outcome.state, outcome.num_posted) == (pb.UPDATE_STATE_FAILED, 2)
        assert "rank 0 aborted update 'halves'" in outcome.error
        assert client.unreleased_bytes == 0


def test_a_sidecar_that_dies_again_and_again_leaves_no_growing_heap_of_memory(start: StartPair) -> None:
    pair = start(tp_size=1)
    tensors = [("a", torch.zeros(256))]
    held = []
    with WeightSyncClient(pair.target, rank=0, tp_size=1, restart_patience=0.0) as client:
        client.update_weights(tensors, version="1", timeout=10)
        os.kill(pair.process.pid, signal.SIGKILL)
        assert pair.process.process.wait_exit(5)
        for _ in range(5):
            with pytest.raises(WeightSyncError):
                client.update_weights(tensors, version="2", timeout=2)
            held.append(client.unreleased_bytes)
    assert held == [0] * 5


def test_a_drain_that_breaks_an_update_off_before_the_engine_was_touched_is_clean(start: StartPair) -> None:
    pair = start("--drain-timeout", "0.3")
    pair.engine.fault("/pause_generation", Fault.HANG)
    answers = [pair.send(pair.request("drained", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    os.kill(pair.process.pid, signal.SIGTERM)
    pair.wait_for(pb.SIDECAR_STATE_DRAINING)
    time.sleep(0.6)  # the drain's time is over, and the applier has still to be told
    pair.engine.release()
    assert {refusal(answer).reason for answer in answers} == {"DRAINING"}
    assert exit_code(pair) == 0
    assert LOAD not in pair.posts()
    assert not pair.is_paused()
    assert not (pair.folder / "sidecar.sock.journal").exists()


def test_a_socket_that_cannot_be_bound_exits_with_3_and_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "s.sock").mkdir()
    done = serve("http://127.0.0.1:9", f"unix:{tmp_path}/s.sock")
    assert done.returncode == 3
    assert f"cannot listen on unix:{tmp_path}/s.sock; is it a folder, or not ours to write?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_long_sentence_is_cut_so_that_it_arrives(pair: Pair) -> None:
    requests = [pair.request("long", rank) for rank in range(2)]
    for rank, request in enumerate(requests):
        request.manifest.manifest.buckets[0].tensors[0].name = "n" * 1020 + str(rank)
    first = pair.send(requests[0])
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    for refused in (refusal(pair.send(requests[1])), refusal(first)):
        assert refused.reason == "RANKS_DIFFER"
        assert len(refused.message) <= 1500
    pair.assert_untouched()


def test_the_sidecars_metrics_are_not_mixed_into_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = tmp_path / "prometheus"
    engines.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(engines))
    port = free_port()
    config = SidecarConfig(
        engine_url="http://127.0.0.1:9",
        listen=f"unix:{tmp_path}/s.sock",
        log_path=tmp_path / "log",
        args=("--http-listen", f"127.0.0.1:{port}"),
    )
    with SidecarProcess(config), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert "weightsync_ready 0.0" in answer.read().decode()
    assert list(engines.iterdir()) == []


def test_an_error_that_says_no_number_of_posts_gives_none() -> None:
    assert UpdateFailed("failed", reason="UPDATE_FAILED").num_posted is None
