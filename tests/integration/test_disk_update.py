"""A checkpoint that the engine loads from its own disk, as a version of its own."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

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
    failed_call,
    failed_update,
    header,
    manifest,
    refusal,
    wait_until,
)

DISK = "/update_weights_from_disk"
PAUSE, END = "/pause_generation", "/end_weight_update"
VISIBLE = ["/flush_cache", "/update_weight_version", "/continue_generation"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder: to the scripted engine, each stands for content of its own."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return str(folder)


def send(
    pair: Pair,
    update_id: str,
    model_path: str,
    *,
    version: str = "",
    mode: pb.PauseMode.ValueType = pb.PAUSE_MODE_UNSPECIFIED,
    timeout_s: float = ANSWER_S,
) -> grpc.Future[pb.UpdateWeightsFromDiskResponse]:
    request = pb.UpdateWeightsFromDiskRequest(
        update_id=update_id,
        weight_version=version or f"version of {update_id}",
        model_path=model_path,
        pause_mode=mode,
    )
    return pair.rpc.UpdateWeightsFromDisk.future(request, timeout=timeout_s)


def load(pair: Pair, update_id: str, model_path: str, version: str = "") -> pb.UpdateOutcome:
    outcome = send(pair, update_id, model_path, version=version).result(ANSWER_S).outcome
    assert outcome.state == pb.UPDATE_STATE_COMMITTED
    return outcome


def server_infos(pair: Pair) -> int:
    """How often the sidecar has asked the engine what it is."""
    return sum(call.path == "/server_info" for call in pair.engine.calls)


def restart(pair: Pair) -> None:
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    pair.engine.restart()
    wait_until(lambda: pair.status().HasField("engine"))


@pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS, "0.5.15.post1"], indirect=True)
def test_one_call_has_every_rank_load_the_checkpoint(
    pair: Pair, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    before = pair.engine.loaded
    outcome = load(pair, "from disk", checkpoint)
    # A session that an update has left open would be in the way of the next one.
    session = [END] if request.node.callspec.params["pair"] == SESSIONS else []
    assert pair.posts() == [PAUSE, *session, DISK, *VISIBLE]
    body = {"model_path": checkpoint, "load_format": "auto", "flush_cache": False, "abort_all_requests": False}
    assert pair.bodies(DISK) == [body]
    assert all(now[name] != then[name] for now, then in zip(pair.engine.loaded, before, strict=True) for name in then)
    assert (outcome.cache_flushed, outcome.num_buckets, outcome.num_posted) == (True, 0, 0)
    assert pair.status().weight_version == pair.engine.weight_version == "version of from disk"
    assert pair.status().last_update == pair.outcome("from disk") == outcome
    assert not pair.is_paused()


def test_requests_in_flight_live_through_it(pair: Pair, checkpoint: str) -> None:
    aborted = pair.engine.aborted_requests
    pair.engine.running_requests = 2
    assert load(pair, "in flight", checkpoint).cache_flushed
    assert (pair.engine.running_requests, pair.engine.aborted_requests) == (2, aborted)
    pair.engine.running_requests = 0


@pytest.mark.parametrize(
    ("mode", "sent"),
    [(pb.PAUSE_MODE_ABORT, "abort"), (pb.PAUSE_MODE_DRAIN, "in_place"), (pb.PAUSE_MODE_NONE, "in_place")],
)
def test_its_pause_is_chosen_as_any_updates(
    pair: Pair, checkpoint: str, mode: pb.PauseMode.ValueType, sent: str
) -> None:
    outcome = send(pair, f"pause {mode}", checkpoint, mode=mode).result(ANSWER_S).outcome
    assert outcome.state == pb.UPDATE_STATE_COMMITTED
    assert pair.bodies(PAUSE) == [{"mode": sent}]


@pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS])
def test_it_heals_a_dirty_engine(start: StartPair, checkpoint: str, release: str) -> None:
    pair = start(release=release)
    pair.engine.fault(LOAD, Fault.CUT, after=1)
    failed_update(pair, "breaks", num_buckets=2)
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
    load(pair, "heals", checkpoint)
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_READY, "version of heals")
    assert not pair.is_paused()
    assert not (pair.folder / "sidecar.sock.journal").exists()
    assert pair.update("goes on").state == pb.UPDATE_STATE_COMMITTED


def test_a_session_that_was_left_open_is_ended_before_it(start: StartPair, checkpoint: str) -> None:
    pair = start()
    pair.engine.fault(END, Fault.CUT)
    failed_update(pair, "breaks")
    assert pair.engine.session_open
    pair.mark()
    load(pair, "heals", checkpoint)
    assert pair.posts() == [PAUSE, END, DISK, *VISIBLE]
    assert pair.update("goes on").state == pb.UPDATE_STATE_COMMITTED
    assert not pair.engine.session_open


def test_the_same_call_again_gets_the_first_ones_answer(pair: Pair, checkpoint: str) -> None:
    first = load(pair, "read again", checkpoint)
    pair.mark()
    assert load(pair, "read again", checkpoint) == first
    assert pair.posts() == []


def test_two_callers_at_a_time_get_one_load(pair: Pair, checkpoint: str) -> None:
    pair.engine.fault(DISK, Fault.HANG)
    first = send(pair, "read twice", checkpoint)
    wait_until(lambda: pair.engine.num_hanging == 1)
    status = pair.status()
    assert (status.state, status.current_update.update_id) == (pb.SIDECAR_STATE_APPLYING, "read twice")
    assert list(status.current_update.waiting_for_ranks) == []
    second = send(pair, "read twice", checkpoint)
    pair.engine.release()
    assert first.result(ANSWER_S) == second.result(ANSWER_S)
    assert pair.posts().count(DISK) == 1


def test_the_same_id_for_something_else_is_refused(pair: Pair, checkpoint: str, tmp_path: Path) -> None:
    load(pair, "taken", checkpoint)
    other = tmp_path / "other"
    other.mkdir()
    pair.mark()
    begin = pb.BeginUpdateRequest(update=header("taken", 0), manifest=pb.ManifestReference(manifest=manifest()))
    for late in (
        send(pair, "taken", str(other)),
        pair.send(pair.request("taken")),
        pair.rpc.BeginUpdate.future(begin, timeout=ANSWER_S),
    ):
        refused = refusal(late)
        assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED")
    assert refusal(pair.push("taken", 0, 0)).reason == "INVALID_HANDLE", "it has no bucket"
    pair.assert_untouched()


def test_the_same_id_for_another_version_of_the_same_folder_is_refused(pair: Pair, checkpoint: str) -> None:
    """Or a caller whose folder has new content would believe that it was loaded."""
    load(pair, "same folder", checkpoint)
    pair.mark()
    refused = refusal(send(pair, "same folder", checkpoint, version="another version"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED")
    pair.assert_untouched()


def test_the_id_of_an_update_from_ranks_is_taken(pair: Pair, checkpoint: str) -> None:
    pair.update("from ranks")
    pair.mark()
    refused = refusal(send(pair, "from ranks", checkpoint))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED")
    pair.assert_untouched()


def test_what_a_server_loaded_before_it_was_restarted_is_no_answer_any_more(start: StartPair, checkpoint: str) -> None:
    pair = start()
    load(pair, "before", checkpoint)
    restart(pair)
    assert pair.status().state == pb.SIDECAR_STATE_UNSYNCED
    refused = refusal(send(pair, "before", checkpoint))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED")
    assert pair.status().state == pb.SIDECAR_STATE_UNSYNCED


def test_a_folder_that_is_missing_fails_with_the_engines_words_and_is_healed_under_the_same_id(
    start: StartPair, checkpoint: str
) -> None:
    pair = start()
    refused = refusal(send(pair, "missing", f"{checkpoint}/no"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "UPDATE_FAILED")
    assert refused.details["cause"] == "ENGINE_REFUSED"
    assert "broke off in phase load after the engine was touched" in refused.message
    assert "Failed to get weights iterator" in refused.message
    assert pair.is_paused()
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_DIRTY, "")
    assert pair.engine.weight_version == "default"
    load(pair, "missing", checkpoint)
    assert (pair.status().state, pair.is_paused()) == (pb.SIDECAR_STATE_READY, False)


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSE_REPLY], ids=lambda fault: fault.name)
def test_a_load_whose_answer_was_lost_is_never_sent_again(start: StartPair, checkpoint: str, fault: Fault) -> None:
    pair = start()
    pair.engine.fault(DISK, fault)
    refused = refusal(send(pair, "lost", checkpoint))
    assert (refused.reason, refused.details["cause"]) == ("UPDATE_FAILED", "ENGINE_LOST")
    assert pair.posts().count(DISK) == 1
    assert pair.is_paused()
    load(pair, "heals", checkpoint)


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.CUT], ids=lambda fault: fault.name)
def test_an_engine_that_does_not_even_pause_is_left_as_it_was(pair: Pair, checkpoint: str, fault: Fault) -> None:
    pair.engine.fault(PAUSE, fault)
    assert refusal(send(pair, f"no pause {fault.name}", checkpoint)).reason in ("ENGINE_REFUSED", "ENGINE_LOST")
    assert pair.outcome(f"no pause {fault.name}").state == pb.UPDATE_STATE_ABORTED
    assert DISK not in pair.posts()
    assert not pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_an_update_from_disk_that_breaks_off_before_it_loads_leaves_a_dirty_engine_held(
    start: StartPair, checkpoint: str
) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.CUT)
    failed_update(pair, "breaks")
    pair.engine.fault(PAUSE, Fault.REFUSE)
    refusal(send(pair, "no pause", checkpoint))
    assert pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY


def test_its_version_must_be_new(start: StartPair, checkpoint: str) -> None:
    pair = start()
    load(pair, "first", checkpoint, version="9")
    load(pair, "second", checkpoint, version="10")
    pair.mark()
    for version in ("10", "9", "8"):
        refused = refusal(send(pair, f"again {version}", checkpoint, version=version))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VERSION_NOT_NEW")
    pair.assert_untouched()
    requests = [pair.request("backwards", rank) for rank in range(2)]
    for request in requests:
        request.update.weight_version = "10"
        assert refusal(pair.send(request)).reason == "VERSION_NOT_NEW"


def test_a_restarted_engine_is_ready_with_it(start: StartPair, checkpoint: str) -> None:
    pair = start()
    restart(pair)
    assert pair.status().state == pb.SIDECAR_STATE_UNSYNCED
    load(pair, "in step", checkpoint)
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_caller_that_goes_changes_nothing(pair: Pair, checkpoint: str) -> None:
    pair.engine.fault(DISK, Fault.HANG)
    gone = send(pair, "left to itself", checkpoint)
    wait_until(lambda: pair.engine.num_hanging == 1)
    gone.cancel()
    refused = refusal(send(pair, "left to itself", checkpoint, timeout_s=3.0))
    assert refused.reason == "STILL_APPLYING"
    pair.engine.release()
    wait_until(lambda: pair.outcome("left to itself").state == pb.UPDATE_STATE_COMMITTED)
    assert pair.engine.weight_version == "version of left to itself"


def test_it_waits_for_no_other_update_and_none_waits_for_it(pair: Pair, checkpoint: str) -> None:
    waiting = pair.send(pair.request("collects"))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    assert refusal(send(pair, "in the way", checkpoint)).reason == "UPDATE_IN_PROGRESS"
    waiting.cancel()
    pair.wait_for(pb.SIDECAR_STATE_READY)
    pair.engine.fault(DISK, Fault.HANG)
    loading = send(pair, "reads first", checkpoint)
    wait_until(lambda: pair.engine.num_hanging == 1)
    for late in (pair.send(pair.request("comes second")), send(pair, "comes third", checkpoint)):
        refused = refusal(late)
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "UPDATE_IN_PROGRESS")
        assert "'reads first'" in refused.message
    abort = pb.AbortUpdateRequest(update_id="reads first", rank=0)
    assert refusal(pair.rpc.AbortUpdate.future(abort, timeout=ANSWER_S)).reason == "NOT_ABORTABLE"
    pair.engine.release()
    assert loading.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_sidecar_that_was_killed_meanwhile_leaves_word_to_its_successor(start: StartPair, checkpoint: str) -> None:
    pair = start()
    pair.engine.fault(DISK, Fault.HANG)
    orphaned = send(pair, "orphaned", checkpoint)
    wait_until(lambda: pair.engine.num_hanging == 1)
    os.kill(pair.process.pid, signal.SIGKILL)
    failed_call(orphaned)
    pair.process.stop()
    pair.engine.release()
    with closing(Pair(pair.engine, pair.folder, manager=False)) as successor:
        assert "'orphaned'" in successor.wait_for(pb.SIDECAR_STATE_DIRTY).reason
        load(successor, "heals", checkpoint)
        assert (successor.status().state, successor.is_paused()) == (pb.SIDECAR_STATE_READY, False)


@pytest.mark.parametrize("looks_again", [False, True])
@pytest.mark.parametrize("release", [SESSIONS, "0.5.15.post1"])
def test_without_a_path_it_is_what_the_engine_was_started_with_whatever_was_loaded_and_seen_since(
    start: StartPair, checkpoint: str, tmp_path: Path, release: str, looks_again: bool
) -> None:
    """Of 0.5.20 and later, /server_info tells the first and /model_info the last; of 0.5.15.post1, both the last."""
    started_with = tmp_path / "started with"
    started_with.mkdir()
    pair = start(release=release, server_info={"model_path": str(started_with)})
    load(pair, "other", checkpoint)
    if looks_again:  # as after every lost answer
        pair.engine.fault("/flush_cache", Fault.LOSE_REPLY)
        asked = server_infos(pair)
        pair.update("looks again")
        wait_until(lambda: server_infos(pair) > asked)
        wait_until(lambda: pair.status().HasField("engine"))
    pair.mark()
    load(pair, "no path", "")
    assert [body["model_path"] for body in pair.bodies(DISK)] == [str(started_with)]


def test_an_engine_that_was_started_with_random_weights_is_told_to_read_files(
    start: StartPair, checkpoint: str
) -> None:
    """With --load-format dummy, as engines of a trainer often are, SGLang refuses a load that names no format."""
    pair = start(server_info={"load_format": "dummy"})
    load(pair, "from files", checkpoint)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"update_id": ""}, "update_id"), ({"weight_version": ""}, "weight_version"), ({"pause_mode": 99}, "pause_mode")],
)
def test_a_call_that_is_wrong_is_refused_by_field(pair: Pair, changes: dict[str, object], field: str) -> None:
    good: dict[str, object] = {"update_id": "wrong", "weight_version": "w", "model_path": "/m"}
    request = pb.UpdateWeightsFromDiskRequest(**(good | changes))  # type: ignore[arg-type]
    refused = refusal(pair.rpc.UpdateWeightsFromDisk.future(request, timeout=ANSWER_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_HEADER")
    assert refused.details["field"] == field
    pair.assert_untouched()


def test_an_engine_that_is_not_there_is_told_of_at_once(start: StartPair, checkpoint: str) -> None:
    pair = start()
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    assert refusal(send(pair, "nobody", checkpoint)).reason == "ENGINE_UNREACHABLE"
