"""Which of the engine's models an update is for, where it decodes speculatively."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.conftest import StartPair
from tests.integration.support import (
    ANSWER_S,
    LOAD,
    NO_SESSIONS,
    Pair,
    header,
    manifest,
    refusal,
)

BEGIN = "/begin_weight_update"
TARGET, DRAFT, ALL = pb.SELECTOR_TARGET, pb.SELECTOR_DRAFT, pb.SELECTOR_ALL
NOT_SAID = pb.SELECTOR_UNSPECIFIED
SPECULATIVE: dict[str, object] = {"speculative_algorithm": "EAGLE"}

Answer: TypeAlias = "grpc.Future[pb.UpdateWeightsResponse]"


def send(pair: Pair, update_id: str, *selectors: pb.Selector.ValueType, num_buckets: int = 1) -> list[Answer]:
    """One call for each rank, with its selector."""
    requests = [pair.request(update_id, rank, num_buckets=num_buckets) for rank in range(2)]
    for request, selector in zip(requests, selectors, strict=True):
        request.update.selector = selector
    return [pair.send(request) for request in requests]


def committed(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def selectors_sent(pair: Pair) -> list[str]:
    """Of the session, and of every bucket in it."""
    return [body["selector"] for path in (BEGIN, LOAD) for body in pair.bodies(path)]


@pytest.mark.parametrize(("selector", "sent"), [(TARGET, "target"), (ALL, "all"), (NOT_SAID, "all")])
def test_the_session_and_every_bucket_are_for_the_model_that_was_chosen(
    pair: Pair, selector: pb.Selector.ValueType, sent: str
) -> None:
    committed(send(pair, f"for {selector}", selector, selector, num_buckets=2))
    assert selectors_sent(pair) == [sent] * 3


@pytest.mark.parametrize("selector", [TARGET, DRAFT])
@pytest.mark.parametrize("pair", [NO_SESSIONS], indirect=True)
def test_a_release_that_cannot_choose_refuses_a_choice(pair: Pair, selector: pb.Selector.ValueType) -> None:
    for rank, answer in enumerate(send(pair, "chosen", selector, selector)):
        refused = refusal(answer)
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SELECTOR_UNSUITABLE")
        name = pb.Selector.Name(selector).removeprefix("SELECTOR_").lower()
        assert refused.message.startswith(f"rank {rank}: selector {name} does not suit this engine: SGLang 0.5.20")
        assert refused.details == {"rank": str(rank), "selector": name}
    pair.assert_untouched()


@pytest.mark.parametrize("pair", [NO_SESSIONS], indirect=True)
def test_all_models_are_what_a_release_without_a_choice_updates(pair: Pair) -> None:
    committed(send(pair, "all", ALL, ALL))
    assert "selector" not in pair.bodies(LOAD)[0]


def test_a_draft_model_that_the_engine_does_not_have_is_refused(pair: Pair) -> None:
    for answer in send(pair, "no draft", DRAFT, DRAFT):
        refused = refusal(answer)
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SELECTOR_UNSUITABLE")
        assert "the engine has no draft model" in refused.message
    pair.assert_untouched()


def test_an_engine_with_a_draft_model_must_be_told_which(start: StartPair) -> None:
    pair = start(server_info=SPECULATIVE)
    reference = pb.ManifestReference(manifest=manifest())
    begin = pb.BeginUpdateRequest(update=header("not said", 0), manifest=reference)
    not_said: list[grpc.Future[Any]] = [
        *send(pair, "not said", NOT_SAID, NOT_SAID),
        pair.rpc.BeginUpdate.future(begin, timeout=ANSWER_S),
    ]
    for answer in not_said:
        refused = refusal(answer)
        assert refused.reason == "SELECTOR_UNSUITABLE"
        assert "selector unspecified" in refused.message
        assert "the engine has a draft model; say target, draft or all" in refused.message
    pair.assert_untouched()
    for selector, name in ((TARGET, "target"), (DRAFT, "draft"), (ALL, "all")):
        pair.mark()
        committed(send(pair, name, selector, selector, num_buckets=2))
        assert selectors_sent(pair) == [name] * 3


def test_a_draft_models_tensors_are_not_held_against_the_target_models_checkpoint(start: StartPair) -> None:
    """Nor remembered as the target's."""
    pair = start(server_info=SPECULATIVE)
    first = send(pair, "target", TARGET, TARGET, num_buckets=2)
    committed(first)
    requests = [pair.request("draft", rank, num_buckets=1) for rank in range(2)]
    for request in requests:
        request.update.selector = DRAFT
        request.update.verify = True
    for answer in [pair.send(request) for request in requests]:
        outcome = answer.result(ANSWER_S).outcome
        assert outcome.verification == pb.VERIFICATION_CONSISTENT
        assert list(outcome.notes) == []
    committed(send(pair, "target again", TARGET, TARGET, num_buckets=2))


def test_a_checkpoint_from_disk_needs_no_choice(start: StartPair) -> None:
    pair = start(server_info=SPECULATIVE)
    request = pb.UpdateWeightsFromDiskRequest(update_id="disk", weight_version="d", model_path=str(pair.folder))
    outcome = pair.rpc.UpdateWeightsFromDisk(request, timeout=ANSWER_S).outcome
    assert outcome.state == pb.UPDATE_STATE_COMMITTED


def test_speculative_decoding_without_a_choice_cannot_be_updated(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS, server_info=SPECULATIVE)
    for answer in send(pair, "both", ALL, ALL):
        assert refusal(answer).reason == "ENGINE_UNSUPPORTED"


def test_ranks_that_choose_another_model_differ(pair: Pair) -> None:
    requests = [pair.request("differ in model", rank) for rank in range(2)]
    requests[0].update.selector, requests[1].update.selector = TARGET, ALL
    waiting = pair.send(requests[0])
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    for refused in (refusal(pair.send(requests[1])), refusal(waiting)):
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "RANKS_DIFFER")
        assert "ranks 0 and 1 differ: selector" in refused.message
        assert "target" in refused.message
        assert "all" in refused.message
    pair.assert_untouched()


def test_a_choice_that_this_protocol_does_not_have_is_refused_by_its_number(pair: Pair) -> None:
    request = pair.request("unknown choice")
    request.update.selector = 99  # type: ignore[assignment]
    refused = refusal(pair.send(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_HEADER")
    assert "selector 99 is unknown to this sidecar" in refused.message
    pair.assert_untouched()
