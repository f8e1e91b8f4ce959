"""A whole update in one call per rank: what the engine is asked, in which order, and what callers are told."""

import threading

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.fakes.unpickling import CudaStorage
from tests.integration.conftest import StartPair
from tests.integration.support import (
    ANSWER_S,
    LOAD,
    NO_SESSIONS,
    SESSIONS,
    Pair,
    expected_posts,
    header,
    manifest,
    refusal,
    wait_until,
)

OLDEST = "0.5.15.post1"
both_dialects = pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)


@both_dialects
@pytest.mark.parametrize("num_buckets", [1, 3])
def test_the_engine_is_asked_once_per_bucket_inside_what_its_release_needs(
    pair: Pair, num_buckets: int, request: pytest.FixtureRequest
) -> None:
    release = request.node.callspec.params["pair"]
    outcome = pair.update(f"order {num_buckets}", num_buckets=num_buckets)
    assert pair.posts() == expected_posts(release, num_buckets)
    assert (outcome.state, outcome.num_buckets, outcome.num_posted) == (
        pb.UPDATE_STATE_COMMITTED,
        num_buckets,
        num_buckets,
    )
    assert outcome.cache_flushed
    assert (outcome.error, list(outcome.waiting_for_ranks)) == ("", [])


@both_dialects
def test_every_body_is_what_that_release_takes(pair: Pair, request: pytest.FixtureRequest) -> None:
    with_sessions = request.node.callspec.params["pair"] == SESSIONS
    pair.update("bodies", num_buckets=2)
    for body in pair.bodies(LOAD):
        assert body.pop("flush_cache") is False
        assert body.pop("load_format") == "flattened_bucket"
        assert len(body.pop("serialized_named_tensors")) == 2
        assert body == ({"selector": "all"} if with_sessions else {})
    assert pair.bodies("/pause_generation") == [{"mode": "retract"}]
    assert pair.bodies("/begin_weight_update") == ([{"selector": "all"}] if with_sessions else [])
    assert pair.bodies("/update_weight_version") == [{"new_version": "version of bodies", "abort_all_requests": False}]


def test_each_tp_rank_is_given_its_own_ranks_memory_and_lets_go_of_it(pair: Pair) -> None:
    requests = [pair.request("own memory", rank, num_buckets=2) for rank in range(2)]
    answers = [pair.send(request) for request in reversed(requests)]
    assert [answer.result(ANSWER_S).outcome.num_posted for answer in answers] == [2, 2]
    loads = [call for call in pair.engine.calls if call.path == LOAD][-2:]
    seen = [[entry.tensors[0].storage for entry in load.entries] for load in loads]
    sent = [[request.handles[bucket].shared_memory.name for request in requests] for bucket in range(2)]
    assert [[getattr(storage, "name", "") for storage in bucket] for bucket in seen] == sent
    assert [tensor.name for tensor in loads[1].entries[0].tensors] == ["layer.1.weight", "layer.1.bias"]
    assert pair.counts() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (pb.PAUSE_MODE_UNSPECIFIED, "retract"),
        (pb.PAUSE_MODE_RETRACT, "retract"),
        (pb.PAUSE_MODE_IN_PLACE, "in_place"),
        (pb.PAUSE_MODE_ABORT, "abort"),
    ],
)
def test_the_pause_mode_is_passed_on(pair: Pair, mode: pb.PauseMode.ValueType, name: str) -> None:
    requests = [pair.request(f"mode {mode}", rank) for rank in range(2)]
    for request in requests:
        request.update.pause_mode = mode
    for answer in [pair.send(request) for request in requests]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert pair.bodies("/pause_generation") == [{"mode": name}]


def test_afterwards_engine_and_sidecar_say_the_version_and_generation_goes_on(pair: Pair) -> None:
    pair.update("told")
    assert pair.engine.weight_version == "version of told"
    assert not pair.is_paused()
    assert not pair.engine.session_open
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_READY, "version of told")
    assert (status.last_update.update_id, status.reason) == ("told", "")
    assert status.engine.version == SESSIONS


def test_every_phase_is_timed_in_its_order(pair: Pair) -> None:
    outcome = pair.update("timed")
    assert [phase.phase for phase in outcome.phases] == list(range(pb.PHASE_COLLECT, pb.PHASE_RESUME + 1))
    assert all(phase.duration.ToNanoseconds() >= 0 for phase in outcome.phases)


def test_a_cache_that_could_not_be_flushed_is_said_so(pair: Pair) -> None:
    pair.engine.running_requests = 1
    try:
        requests = [pair.request("unflushed", rank) for rank in range(2)]
        for request in requests:
            request.update.pause_mode = pb.PAUSE_MODE_IN_PLACE
        answers = [pair.send(request) for request in requests]
        outcome, _ = (answer.result(ANSWER_S).outcome for answer in answers)
    finally:
        pair.engine.running_requests = 0
    assert outcome.state == pb.UPDATE_STATE_COMMITTED
    assert not outcome.cache_flushed
    assert pair.posts()[-2:] == ["/update_weight_version", "/continue_generation"]


def test_a_trainer_of_one_rank_needs_one_call(start: StartPair) -> None:
    pair = start(tp_size=1)
    assert pair.update("alone", tp_size=1).state == pb.UPDATE_STATE_COMMITTED
    assert pair.posts() == expected_posts(SESSIONS, 1)


def test_many_updates_in_a_row_leave_nothing_behind(pair: Pair) -> None:
    for number in range(25):
        assert pair.update(f"row {number}").state == pb.UPDATE_STATE_COMMITTED
    assert pair.posts() == expected_posts(SESSIONS, 1) * 25
    assert set(pair.counts()) == {1}


def test_cuda_handles_reach_the_engine_field_by_field(cuda_pair: Pair) -> None:
    requests = []
    for rank in range(2):
        handle = pb.CudaIpcHandle(
            device_uuid=f"GPU-6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c5{rank}",
            memory_handle=b"\x01c" + bytes([rank]) * 64,
            storage_size_bytes=2**33,
            storage_offset_bytes=512 * rank,
            ref_counter_handle=f"/torch_9_8_{rank}",
            ref_counter_offset=rank,
            event_handle=bytes([7]) * 64,
            event_sync_required=bool(rank),
        )
        requests.append(
            pb.UpdateWeightsRequest(
                update=header("cuda fields", rank),
                manifest=pb.ManifestReference(manifest=manifest()),
                handles=[pb.MemoryHandle(cuda_ipc=handle)],
            )
        )
    for answer in [cuda_pair.send(request) for request in requests]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert cuda_pair.posts() == expected_posts(OLDEST, 1)
    (load,) = [call for call in cuda_pair.engine.calls if call.path == LOAD][-1:]
    assert [entry.tensors[0].storage for entry in load.entries] == [
        CudaStorage(
            device=f"6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c5{rank}",
            memory_handle=b"\x01c" + bytes([rank]) * 64,
            size_bytes=2**33,
            offset_bytes=512 * rank,
            ref_counter_handle=f"/torch_9_8_{rank}",
            ref_counter_offset=rank,
            event_handle=bytes([7]) * 64,
            event_sync_required=bool(rank),
        )
        for rank in range(2)
    ]


# The same call again.


def test_a_repeated_call_gets_the_first_answer_and_posts_nothing_again(pair: Pair) -> None:
    requests = [pair.request("repeated", rank) for rank in range(2)]
    first = [pair.send(request).result for request in requests]
    answers = [result(ANSWER_S) for result in first]
    again = [pair.send(request).result(ANSWER_S) for request in requests]
    assert again == answers
    assert pair.posts() == expected_posts(SESSIONS, 1)


def test_a_call_repeated_while_the_first_waits_shares_its_answer(pair: Pair) -> None:
    request = pair.request("shared", 0)
    twins = [pair.send(request), pair.send(request)]
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    other = pair.send(pair.request("shared", 1))
    outcomes = [answer.result(ANSWER_S).outcome for answer in (*twins, other)]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert pair.posts() == expected_posts(SESSIONS, 1)


def test_an_update_id_is_used_once(pair: Pair) -> None:
    pair.update("used")
    pair.mark()
    refused = refusal(pair.send(pair.request("used", 0)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED")
    assert "update id 'used' has ended (committed) and these weights, from rank 0, were not loaded" in refused.message
    other = pair.request("used", 0)
    other.update.weight_version = "another"
    refused = refusal(pair.send(other))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UPDATE_ID_REUSED")
    pair.assert_untouched()


def test_the_id_of_an_aborted_update_may_be_used_again(pair: Pair) -> None:
    waiting = pair.send(pair.request("again", 0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    pair.rpc.AbortUpdate(pb.AbortUpdateRequest(update_id="again", rank=0), timeout=5)
    assert refusal(waiting).reason == "UPDATE_ABORTED"
    assert pair.update("again").state == pb.UPDATE_STATE_COMMITTED


# Manifests by digest.


def test_a_digest_stands_for_a_manifest_that_was_sent_before(pair: Pair) -> None:
    digest = pair.update("in full").manifest_digest
    assert len(digest) == 64
    requests = [pair.request("by digest", rank) for rank in range(2)]
    for request in requests:
        request.manifest.CopyFrom(pb.ManifestReference(digest=digest))
    for answer in [pair.send(request) for request in requests]:
        outcome = answer.result(ANSWER_S).outcome
        assert (outcome.state, outcome.manifest_digest) == (pb.UPDATE_STATE_COMMITTED, digest)


def test_one_rank_may_send_the_digest_and_another_the_manifest(pair: Pair) -> None:
    digest = pair.update("mixed before").manifest_digest
    requests = [pair.request("mixed", rank) for rank in range(2)]
    requests[0].manifest.CopyFrom(pb.ManifestReference(digest=digest))
    for answer in [pair.send(request) for request in requests]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_an_unknown_digest_is_not_found_and_touches_nothing(pair: Pair) -> None:
    request = pair.request("unknown digest", 0)
    request.manifest.CopyFrom(pb.ManifestReference(digest="0" * 64))
    refused = refusal(pair.send(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "MANIFEST_UNKNOWN")
    assert refused.message.endswith("send the manifest in full")
    pair.assert_untouched()


# Outcomes, and callers that go away.


def test_the_outcome_of_an_update_can_be_asked_for_by_its_id(pair: Pair) -> None:
    answered = pair.update("asked for")
    assert pair.outcome("asked for") == answered
    refused = refusal(pair.rpc.GetUpdate.future(pb.GetUpdateRequest(update_id="never was"), timeout=5))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UPDATE_UNKNOWN")
    assert "'never was'" in refused.message


def test_an_update_commits_although_its_callers_cancelled_while_it_was_applied(pair: Pair) -> None:
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("cancelled late", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    for answer in answers:
        answer.cancel()
    assert pair.outcome("cancelled late").state == pb.UPDATE_STATE_APPLYING
    pair.engine.release()
    wait_until(lambda: pair.outcome("cancelled late").state == pb.UPDATE_STATE_COMMITTED)
    assert pair.posts() == expected_posts(SESSIONS, 1)
    assert pair.engine.weight_version == "version of cancelled late"


def test_a_deadline_while_the_engine_loads_says_so_and_the_update_goes_on(pair: Pair) -> None:
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("too slow", rank), timeout_s=2.5) for rank in range(2)]
    for answer in answers:
        refused = refusal(answer)
        assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "STILL_APPLYING")
        assert "update 'too slow' is still being applied (phase load, bucket 0 of 1)" in refused.message
    pair.engine.release()
    wait_until(lambda: pair.outcome("too slow").state == pb.UPDATE_STATE_COMMITTED)


def test_status_and_capabilities_answer_while_the_engine_loads(pair: Pair) -> None:
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("observed", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    status = pair.status()
    assert (status.state, status.current_update.update_id) == (pb.SIDECAR_STATE_APPLYING, "observed")
    assert status.current_update.num_posted == 1
    capabilities = pair.rpc.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=2)
    assert (capabilities.engine.tp_size, capabilities.engine.uses_sessions) == (2, True)
    refused = refusal(pair.send(pair.request("impatient", 0)))
    assert refused.reason == "UPDATE_IN_PROGRESS"
    assert "update 'observed' is applying" in refused.message
    pair.engine.release()
    assert [answer.result(ANSWER_S).outcome.state for answer in answers] == [pb.UPDATE_STATE_COMMITTED] * 2


def test_ranks_that_arrive_at_the_same_moment_are_one_update(pair: Pair) -> None:
    barrier = threading.Barrier(2)
    states = []

    def rank(number: int) -> None:
        request = pair.request("together", number)
        barrier.wait()
        states.append(pair.rpc.UpdateWeights(request, timeout=ANSWER_S).outcome.state)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == [pb.UPDATE_STATE_COMMITTED] * 2
    assert pair.posts() == expected_posts(SESSIONS, 1)
