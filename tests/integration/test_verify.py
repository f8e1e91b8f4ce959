"""Checksums, on request: what they prove, and that a version which they disprove is never served.

A sidecar that has verified an update holds later manifests against it, so each test has one of its own.
"""

from __future__ import annotations

import os

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair, counters
from tests.integration.support import (
    ANSWER_S,
    BUCKET_BYTES,
    LOAD,
    NO_SESSIONS,
    SESSIONS,
    Pair,
    Refusal,
    expected_posts,
    refusal,
)
from tests.integration.test_bad_input import CUDA

CHECKER, PUBLISH = "/weights_checker", "/update_weight_version"
COUNTERS = f"torch_verified_{os.getpid()}"
CONSISTENT, PROVEN = pb.VERIFICATION_CONSISTENT, pb.VERIFICATION_PROVEN


def send(
    pair: Pair, update_id: str, content: bytes, *, digest: str = ""
) -> list[grpc.Future[pb.UpdateWeightsResponse]]:
    """Both ranks send; ``content`` has one byte per rank, which fills its memory."""
    requests = [pair.request(update_id, rank) for rank in range(2)]
    for rank, request in enumerate(requests):
        request.handles[0].CopyFrom(pair.handle(content[rank : rank + 1] * BUCKET_BYTES))
        request.update.verify = True
        request.update.content_digest = digest
    return [pair.send(request) for request in requests]


def verified(pair: Pair, update_id: str, content: bytes, *, digest: str = "") -> pb.UpdateOutcome:
    first, second = [answer.result(ANSWER_S).outcome for answer in send(pair, update_id, content, digest=digest)]
    assert first == second
    assert (first.state, list(first.notes)) == (pb.UPDATE_STATE_COMMITTED, [])
    return first


def disproved(pair: Pair, update_id: str, content: bytes, *, digest: str = "") -> Refusal:
    first, second = [refusal(answer) for answer in send(pair, update_id, content, digest=digest)]
    assert first == second
    assert (first.reason, first.details["cause"]) == ("UPDATE_FAILED", "CHECKSUMS_DIFFER")
    return first


def test_content_that_comes_again_is_proven(start: StartPair) -> None:
    pair = start()
    assert verified(pair, "1", b"aa", digest="A").verification == CONSISTENT
    assert verified(pair, "2", b"bb", digest="B").verification == CONSISTENT
    pair.mark()
    again = verified(pair, "3", b"aa", digest="A")
    assert again.verification == PROVEN
    assert verified(pair, "4", b"cc").verification == CONSISTENT, "content without a name"
    phases = [phase.phase for phase in again.phases]
    assert phases.index(pb.PHASE_FLUSH) < phases.index(pb.PHASE_VERIFY) < phases.index(pb.PHASE_PUBLISH)
    posts = expected_posts(SESSIONS, 1)
    posts.insert(posts.index(PUBLISH), CHECKER)
    assert pair.posts()[: len(posts)] == posts
    assert pair.bodies(CHECKER)[0] == {"action": "checksum"}


def test_nothing_is_verified_that_nobody_asked_for(pair: Pair) -> None:
    request = [pair.request("not asked", rank) for rank in range(2)]
    for one in request:
        one.update.content_digest = "A"
    for answer in [pair.send(one) for one in request]:
        assert answer.result(ANSWER_S).outcome.verification == pb.VERIFICATION_UNSPECIFIED
    assert CHECKER not in pair.posts()


def test_half_loaded_weights_are_found_out_and_never_served(start: StartPair) -> None:
    pair = start()
    verified(pair, "1", b"aa", digest="A")
    verified(pair, "2", b"bb", digest="B")
    pair.engine.fault(LOAD, Fault.SKIP_HALF)  # SGLang answers 200 to names that it does not know
    pair.mark()
    error = disproved(pair, "3", b"aa", digest="A")
    assert error.code is grpc.StatusCode.INTERNAL
    assert "broke off in phase verify" in error.message
    assert "rank 0 differs from what this content gave before: layer.0.bias" in error.message
    assert PUBLISH not in pair.posts()
    assert pair.engine.weight_version == "version of 2"
    assert pair.is_paused()
    status = pair.status()
    assert (status.state, status.weight_version, status.reason) == (pb.SIDECAR_STATE_DIRTY, "", error.message)
    assert pair.outcome("3").verification == pb.VERIFICATION_UNSPECIFIED
    assert verified(pair, "3", b"aa", digest="A").verification == PROVEN
    assert not pair.is_paused()
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_rank_whose_copy_differs_from_the_others_is_found_out(start: StartPair) -> None:
    """Once two contents have shown that every rank holds these tensors whole."""
    pair = start()
    verified(pair, "1", b"aa")
    verified(pair, "2", b"bb")
    error = disproved(pair, "3", b"cd")
    assert "ranks differ in tensors that each of them holds whole: layer.0.weight, layer.0.bias" in error.message
    assert verified(pair, "4", b"dd").verification == CONSISTENT


def test_shards_that_differ_between_ranks_are_no_difference(start: StartPair) -> None:
    pair = start()
    for update_id, content in (("1", b"ab"), ("2", b"cc"), ("3", b"dd"), ("4", b"ef")):
        assert verified(pair, update_id, content).verification == CONSISTENT


def test_an_engine_that_computes_no_checksums_says_why(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS)
    for answer in send(pair, "1", b"aa", digest="A"):
        outcome = answer.result(ANSWER_S).outcome
        assert (outcome.state, outcome.verification) == (pb.UPDATE_STATE_COMMITTED, pb.VERIFICATION_UNAVAILABLE)
        (note,) = outcome.notes
        assert note.startswith(f"not verified: the engine at {pair.engine.url} answered 400 to /weights_checker")
        assert "Found no NVIDIA driver" in note
    assert pair.engine.weight_version == "version of 1"
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_look_at_the_checksums_whose_answer_was_lost_is_taken_again(start: StartPair) -> None:
    """It changes nothing, and good weights are no reason to hold generation."""
    pair = start()
    pair.engine.fault(CHECKER, Fault.LOSE_REPLY)
    assert verified(pair, "1", b"aa", digest="A").verification == CONSISTENT
    assert not pair.is_paused()


def test_checksums_that_never_come_leave_the_version_unserved(start: StartPair) -> None:
    pair = start("--verify-timeout", "0.5")
    pair.engine.fault(CHECKER, Fault.HANG, times=3)
    errors = [refusal(answer) for answer in send(pair, "1", b"aa", digest="A")]
    pair.engine.release()
    assert {error.reason for error in errors} == {"UPDATE_FAILED"}
    assert "broke off in phase verify" in errors[0].message
    assert pair.engine.weight_version == "default"
    assert pair.is_paused()
    assert verified(pair, "2", b"aa", digest="A").verification == CONSISTENT


def test_replicas_that_answer_for_the_same_ranks_are_no_more_ranks(start: StartPair) -> None:
    """Under DP attention every replica's first rank answers, each for all TP ranks (seen on 0.5.23, --tp 2 --dp 2)."""
    pair = start(server_info={"enable_dp_attention": True, "attn_dp_size": 2})
    assert verified(pair, "1", b"aa", digest="A").verification == CONSISTENT
    assert verified(pair, "2", b"aa", digest="A").verification == PROVEN


def on_gpu(pair: Pair, update_id: str, content: bytes) -> pb.UpdateWeightsRequest:
    """One rank's, from the memory of a GPU, which computes checksums on every release."""
    request = pair.request(update_id, tp_size=1)
    request.handles[0].CopyFrom(pb.MemoryHandle(cuda_ipc=CUDA))
    request.handles[0].cuda_ipc.memory_handle = b"\x01c" + content * 64  # stands for the content
    request.handles[0].cuda_ipc.ref_counter_handle = f"/{COUNTERS}"
    request.update.verify, request.update.content_digest = True, content.decode()
    return request


@pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS, "0.5.15.post1"])
def test_every_release_with_a_gpu_can_prove_its_content(start: StartPair, release: str) -> None:
    """Where a rank is said to be is a list on 0.5.23, and one place on 0.5.20 and before."""
    pair = start(release=release, tp_size=1, device="cuda")
    with counters(COUNTERS):
        seen = [
            pair.send(on_gpu(pair, str(number), content)).result(ANSWER_S).outcome.verification
            for number, content in enumerate((b"a", b"b", b"a"))
        ]
    assert seen == [CONSISTENT, CONSISTENT, PROVEN]


def test_a_bucket_that_carries_its_version_cannot_be_verified_before_that_is_served(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS, tp_size=1, device="cuda")
    with counters(COUNTERS):
        request = on_gpu(pair, "unpaused", b"a")
        request.update.pause_mode = pb.PAUSE_MODE_NONE
        refused = refusal(pair.send(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PAUSE_MODE_UNSUITABLE")
    pair.assert_untouched()


def test_ranks_that_ask_for_different_proofs_differ(pair: Pair) -> None:
    for field, value in (("verify", True), ("content_digest", "B")):
        name = f"differ in {field}"
        requests = [pair.request(name, rank) for rank in range(2)]
        setattr(requests[1].update, field, value)
        waiting = pair.send(requests[0])
        pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
        for refused in (refusal(pair.send(requests[1])), refusal(waiting)):
            assert (refused.reason, field in refused.message) == ("RANKS_DIFFER", True)
    pair.assert_untouched()


@pytest.mark.parametrize("digest", ["x" * 129, "two\nlines"])
def test_a_digest_that_cannot_be_printed_is_refused(pair: Pair, digest: str) -> None:
    request = pair.request("bad digest")
    request.update.content_digest = digest
    refused = refusal(pair.send(request))
    assert (refused.reason, refused.details["field"]) == ("INVALID_HEADER", "content_digest")
    pair.assert_untouched()
