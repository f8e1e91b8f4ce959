"""An engine with the replay loader: what the sidecar sends it, and what it makes of the loader's own answers."""

import os
import signal
from pathlib import Path

import pytest

from adapter.lease import Lease
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.fakes.replay import ReplayScript
from tests.integration.conftest import StartPair, counters
from tests.integration.support import (
    LOAD,
    NO_SESSIONS,
    SESSIONS,
    Pair,
    expected_posts,
    failed_update,
    header,
    manifest,
    refusal,
)

on_release = pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS])


def asked(script: ReplayScript, rank: int = 0) -> list[str]:
    """What a rank's loader was asked since the last time."""
    asks = [said["ask"] for said in script.headers if said["rank"] == rank]
    script.headers.clear()
    return asks


@on_release
def test_loaders_are_greeted_once_and_a_manifest_is_told_once(start: StartPair, release: str) -> None:
    script = ReplayScript()
    pair = start(release=release, replay=script)
    outcome = pair.update("a", num_buckets=2)
    assert (outcome.load_path, outcome.load_reason) == (pb.LOAD_PATH_REPLAYED, "it was to be replayed")
    assert asked(script) == ["hello", "load", "load"]
    pair.mark()
    pair.update("b", num_buckets=2)
    assert pair.posts() == expected_posts(release, 2)
    assert not any("tensors" in said for said in script.headers)
    assert set(pair.engine.loaded[1]) >= {"layer.0.weight", "layer.0.bias", "layer.1.weight", "layer.1.bias"}


def test_capabilities_say_whether_updates_are_replayed(start: StartPair) -> None:
    pair = start(replay=ReplayScript())
    assert pair.rpc.GetCapabilities(pb.GetCapabilitiesRequest()).engine.replays


def test_the_slowest_way_of_all_ranks_and_buckets_is_told_with_its_reason(start: StartPair) -> None:
    pair = start(replay=ReplayScript(outcomes=["replayed", "fell_back", "recorded"]))
    outcome = pair.update("a", num_buckets=3)
    assert (outcome.load_path, outcome.load_reason) == (pb.LOAD_PATH_FELL_BACK, "it was to be fell_back")


def test_a_manifest_that_a_loader_has_forgotten_is_told_again_and_memory_is_posted_once(start: StartPair) -> None:
    script = ReplayScript()
    pair = start(replay=script)
    pair.update("a")
    pair.engine.forget_plans()
    asked(script)
    assert pair.update("b").state == pb.UPDATE_STATE_COMMITTED
    assert asked(script) == ["load", "load_held"]
    assert set(pair.counts()) == {1}  # the engine has let go of every piece, once


def test_a_post_says_as_little_of_ten_tensors_as_of_one(start: StartPair) -> None:
    pair = start(replay=ReplayScript())
    for update in ("a", "b"):
        pair.mark()
        pair.update(update, num_buckets=2)
    sizes = [len(entry) for body in pair.bodies(LOAD) for entry in body["serialized_named_tensors"]]
    assert len(sizes) == 4
    assert max(sizes) < 1200


def test_without_an_answer_to_the_greeting_updates_go_the_stock_way(start: StartPair) -> None:
    script = ReplayScript(silent_ranks={1})
    pair = start(replay=script)
    outcome = pair.update("a")
    assert outcome.load_path == pb.LOAD_PATH_STOCK
    assert "ranks [1] gave no answer" in outcome.notes[-1]
    pair.update("b")
    assert asked(script) == ["hello"]


def test_a_restarted_engine_is_greeted_again_and_told_the_manifest_again(start: StartPair) -> None:
    script = ReplayScript()
    pair = start(replay=script)
    pair.update("a")
    pair.engine.die()
    pair.wait_for(pb.SIDECAR_STATE_ENGINE_UNREACHABLE)
    pair.engine.restart()
    pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)
    script.headers.clear()
    assert pair.update("b").load_path == pb.LOAD_PATH_REPLAYED
    assert "tensors" in script.headers[-1]
    assert asked(script) == ["hello", "load"]


@pytest.mark.parametrize(("outcome", "said"), [("failed", "it was to be failed"), ("silent", "it gave no answer")])
def test_an_update_that_a_loader_does_not_vouch_for_fails_and_the_next_one_heals(
    start: StartPair, outcome: str, said: str
) -> None:
    script = ReplayScript()
    pair = start(replay=script)
    pair.update("a")
    script.outcomes = [outcome]
    refused = failed_update(pair, "b")
    assert refused.reason == "UPDATE_FAILED"
    assert said in refused.message
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
    assert pair.engine.paused
    healed = pair.update("c")
    assert healed.load_path == (pb.LOAD_PATH_STOCK if outcome == "silent" else pb.LOAD_PATH_REPLAYED)
    pair.wait_for(pb.SIDECAR_STATE_READY)


def test_a_lost_reply_is_made_up_for_by_the_loaders_own_answer(start: StartPair) -> None:
    pair = start(replay=ReplayScript())
    pair.update("a")
    pair.engine.fault(LOAD, Fault.LOSE_REPLY)
    outcome = pair.update("b")
    assert outcome.state == pb.UPDATE_STATE_COMMITTED
    assert outcome.load_path == pb.LOAD_PATH_REPLAYED
    assert "was lost" in outcome.notes[-1]


def test_an_engine_that_dies_in_a_load_is_told_as_ever(start: StartPair) -> None:
    pair = start(replay=ReplayScript())
    pair.update("a")
    pair.engine.fault(LOAD, Fault.DIE_AFTER)
    assert failed_update(pair, "b").reason in ("ENGINE_LOST", "ENGINE_RESTARTED")


def test_a_sidecar_can_be_told_not_to_replay(start: StartPair) -> None:
    script = ReplayScript()
    pair = start("--no-replay", replay=script)
    assert pair.update("a").load_path == pb.LOAD_PATH_STOCK
    assert asked(script) == []


def test_a_bucket_that_carries_its_version_goes_the_stock_way(start: StartPair) -> None:
    script = ReplayScript()
    pair = start(release=NO_SESSIONS, tp_size=1, replay=script)
    request = pair.request("a", tp_size=1)
    request.update.pause_mode = pb.PAUSE_MODE_NONE
    assert pair.send(request).result(20).outcome.load_path == pb.LOAD_PATH_STOCK
    assert asked(script) == []


def test_names_that_may_be_skipped_are_told_with_the_manifest(start: StartPair) -> None:
    script = ReplayScript()
    pair = start(replay=script)
    requests = [pair.request("a", rank) for rank in range(2)]
    for request in requests:
        request.update.allow.unknown.append("*.bias")
    for answer in [pair.send(request) for request in requests]:
        answer.result(20)
    assert script.headers[-1]["skippable"] == ["layer.0.bias"]


def test_the_file_for_answers_goes_with_the_sidecar(start: StartPair) -> None:
    script = ReplayScript()
    pair = start(replay=script)
    pair.update("a")
    file = Path("/dev/shm") / script.headers[0]["verdict"]
    assert file.stat().st_mode & 0o777 == 0o600
    os.kill(pair.process.process.pid, signal.SIGTERM)
    pair.process.process.wait_exit(10)
    assert not file.exists()


# GPU memory that stays mapped.


def cuda_request(pair: Pair, update_id: str, lease: str, *, kept: bool) -> pb.UpdateWeightsRequest:
    handle = pb.CudaIpcHandle(
        device_uuid="0f3d4c5b-1111-2222-3333-444455556666",
        memory_handle=b"\x02c" + bytes(64),
        storage_size_bytes=128,
        ref_counter_handle="/torch_77_replay",
        event_handle=bytes(64),
        event_sync_required=True,
        lease=lease,
        kept=kept,
        ready_event=bytes(64) if kept else b"",
    )
    return pb.UpdateWeightsRequest(
        update=header(update_id, 0, tp_size=1),
        manifest=pb.ManifestReference(manifest=manifest()),
        handles=[pb.MemoryHandle(cuda_ipc=handle)],
    )


def test_memory_that_the_engine_keeps_is_named_by_its_lease_without_a_handle(start: StartPair) -> None:
    script, lease = ReplayScript(), Lease()
    pair = start(tp_size=1, device="cuda", replay=script)
    with counters("torch_77_replay"):
        for update, kept in (("a", False), ("b", True)):
            pair.send(cuda_request(pair, update, lease.name, kept=kept)).result(20)
    loads = [said for said in script.headers if said["ask"] == "load"]
    assert [said["lease"] for said in loads] == [lease.name] * 2
    assert [said["event"] for said in loads] == ["", "00" * 64]
    first, second = (len(body["serialized_named_tensors"][0]) for body in pair.bodies(LOAD)[1:])
    assert second < first


def test_kept_memory_is_refused_where_updates_are_not_replayed(start: StartPair) -> None:
    pair, lease = start("--no-replay", tp_size=1, device="cuda", replay=ReplayScript()), Lease()
    with counters("torch_77_replay"):
        refused = refusal(pair.send(cuda_request(pair, "a", lease.name, kept=True)))
    assert refused.reason == "MEMORY_IS_KEPT"
    assert "hand the memory over anew, by sending again" in refused.message
    pair.assert_untouched()


def test_a_lease_of_another_name_is_refused(start: StartPair) -> None:
    pair = start(tp_size=1, device="cuda", replay=ReplayScript())
    with counters("torch_77_replay"):
        refused = refusal(pair.send(cuda_request(pair, "a", "../../etc/passwd", kept=True)))
    assert (refused.reason, "is not a lease's name" in refused.message) == ("INVALID_HANDLE", True)
