"""An update that a rank gives up before it has begun, or without being part of it: the others are told, once."""

from __future__ import annotations

import grpc

from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.groups import joined, ready
from tests.integration.support import ANSWER_S, Pair, failed_call, refusal

WHY = "RuntimeError: out of memory"


def give_up(pair: Pair, update_id: str, rank: int, *, even_if_not_begun: bool = True) -> pb.UpdateOutcome:
    request = pb.AbortUpdateRequest(update_id=update_id, rank=rank, reason=WHY, even_if_not_begun=even_if_not_begun)
    return pair.rpc.AbortUpdate(request, timeout=ANSWER_S).outcome


def test_whoever_asks_for_an_update_that_was_given_up_before_it_began_is_told(pair: Pair) -> None:
    pair.mark()
    outcome = give_up(pair, "never began", rank=3)
    answer = pair.rpc.GetUpdate(pb.GetUpdateRequest(update_id="never began"), timeout=ANSWER_S)
    asked = answer.outcome
    assert asked.state == outcome.state == pb.UPDATE_STATE_ABORTED
    assert asked.error == f"rank 3 aborted update 'never began': {WHY}"
    assert asked.error_reason == "UPDATE_ABORTED"
    assert 0.0 < answer.ended_ago.ToMicroseconds() / 1e6 < ANSWER_S
    assert (pair.posts(), pair.status().state) == ([], pb.SIDECAR_STATE_READY)


def test_without_that_wish_an_unknown_update_is_unknown(pair: Pair) -> None:
    request = pb.AbortUpdateRequest(update_id="nobody's", rank=0)
    refused = refusal(pair.rpc.AbortUpdate.future(request, timeout=ANSWER_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UPDATE_UNKNOWN")


def test_whoever_brings_a_part_of_it_soon_after_is_told_once_and_may_try_again(pair: Pair) -> None:
    give_up(pair, "once", rank=1)
    first = pair.send(pair.request("once", 0))
    assert f"rank 1 aborted update 'once': {WHY}" in refusal(first).message
    assert pair.update("once").state == pb.UPDATE_STATE_COMMITTED


def test_a_committed_update_is_not_given_up_any_more(pair: Pair) -> None:
    committed = pair.update("committed before")
    assert committed.state == pb.UPDATE_STATE_COMMITTED
    request = pb.AbortUpdateRequest(update_id="committed before", rank=0, even_if_not_begun=True)
    refused = refusal(pair.rpc.AbortUpdate.future(request, timeout=ANSWER_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_ABORTABLE")
    assert pair.outcome("committed before") == committed


def test_a_rank_that_only_gathers_along_gives_up_what_is_broadcast(pair: Pair) -> None:
    joined(pair, "gathered by three")
    ready(pair, "gathered by three")
    outcome = give_up(pair, "gathered by three", rank=2)
    assert outcome.state == pb.UPDATE_STATE_ABORTED
    assert f"rank 2 aborted update 'gathered by three': {WHY}" in outcome.error


def test_a_rank_that_has_not_begun_does_not_give_up_what_comes_from_memory(pair: Pair) -> None:
    pair.begin("of two ranks")
    request = pb.AbortUpdateRequest(update_id="of two ranks", rank=7, even_if_not_begun=True)
    assert failed_call(pair.rpc.AbortUpdate.future(request, timeout=ANSWER_S)).code() is not grpc.StatusCode.OK
    give_up(pair, "of two ranks", rank=0, even_if_not_begun=False)


def test_an_id_that_could_not_name_an_update_cannot_be_given_up(pair: Pair) -> None:
    request = pb.AbortUpdateRequest(update_id="x" * 129, rank=0, even_if_not_begun=True)
    refused = refusal(pair.rpc.AbortUpdate.future(request, timeout=ANSWER_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_HEADER")
