"""Loads of LoRA adapters as a trainer in any language asks for them: ranks that differ, go or repeat themselves."""

from __future__ import annotations

import json
import os
import signal

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes.lora import LOAD
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, Pair, Refusal, refusal, wait_until
from tests.integration.test_lora_adapter import CONFIG, LORA, MODULE, exists


def request(pair: Pair, of_rank: int, **changes: object) -> pb.LoadLoraAdapterRequest:
    """One rank's part as any language would write it."""
    a = pb.TensorSpec(
        name=f"{MODULE}.lora_A.weight", dtype=pb.DATA_TYPE_FLOAT32, shape=[2, 4], byte_offset=0, size_bytes=32
    )
    b = pb.TensorSpec(
        name=f"{MODULE}.lora_B.weight", dtype=pb.DATA_TYPE_FLOAT32, shape=[4, 2], byte_offset=64, size_bytes=32
    )
    manifest = pb.Manifest(buckets=[pb.BucketSpec(size_bytes=128, tensors=[a, b])])
    fields: dict[str, object] = {
        "update_id": "load",
        "rank": of_rank,
        "tp_size": 2,
        "lora_name": "tuned",
        "config_json": json.dumps(CONFIG),
        "manifest": pb.ManifestReference(manifest=manifest),
        "handle": pair.handle(),
    }
    return pb.LoadLoraAdapterRequest(**(fields | changes))  # type: ignore[arg-type]


def call(pair: Pair, of_rank: int, **changes: object) -> grpc.Future[pb.LoadLoraAdapterResponse]:
    return pair.rpc.LoadLoraAdapter.future(request(pair, of_rank, **changes), timeout=ANSWER_S)


def refused(pair: Pair, **changes: object) -> Refusal:
    return refusal(call(pair, 0, **changes))


def test_ranks_that_differ_are_told_so(start: StartPair) -> None:
    pair = start(server_info=LORA)
    answers = [call(pair, 0), call(pair, 1, config_json=json.dumps(CONFIG | {"lora_alpha": 5}))]
    for one in answers:
        assert refusal(one).reason == "RANKS_DIFFER"
    pair.assert_untouched()


def test_a_rank_that_dies_while_others_are_awaited_takes_its_memory_back(start: StartPair) -> None:
    pair = start(server_info=LORA)
    first = call(pair, 0)
    wait_until(lambda: exists(pair, "load"))
    second = call(pair, 0, update_id="other")
    assert refusal(second).reason == "UPDATE_IN_PROGRESS"
    first.cancel()
    wait_until(lambda: pair.outcome("load").state == pb.UPDATE_STATE_ABORTED)
    assert "cancelled its call, or died" in pair.outcome("load").error
    pair.assert_untouched()


def test_an_adapter_and_an_update_are_never_in_hand_together(start: StartPair) -> None:
    pair = start(server_info=LORA)
    update = pair.send(pair.request("update"))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    assert "update 'update' is in hand" in refused(pair).message
    update.cancel()
    pair.wait_for(pb.SIDECAR_STATE_READY)
    load = call(pair, 0)
    wait_until(lambda: exists(pair, "load"))
    busy = refusal(pair.send(pair.request("update")))
    assert (busy.reason, "LoRA adapter 'tuned' is in hand" in busy.message) == ("UPDATE_IN_PROGRESS", True)
    assert call(pair, 1).result(ANSWER_S).loaded_adapters == ["tuned"]
    load.result(ANSWER_S)
    assert pair.update("update").state == pb.UPDATE_STATE_COMMITTED


def test_the_same_call_again_gets_its_answer_and_posts_nothing(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    same = request(pair, 0, tp_size=1)
    outcomes = [pair.rpc.LoadLoraAdapter(same, timeout=ANSWER_S).outcome for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert pair.posts().count(LOAD) == 1
    assert pair.outcome("load") == outcomes[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_name": ""}, "INVALID_ADAPTER"),
        ({"config_json": "[]"}, "INVALID_ADAPTER"),
        ({"config_json": json.dumps(CONFIG | {"r": 3})}, "INVALID_ADAPTER"),
        ({"rank": 7}, "RANK_OUT_OF_RANGE"),
        ({"tp_size": 3}, "TP_SIZE_MISMATCH"),
        ({"update_id": ""}, "INVALID_HEADER"),
        ({"handle": pb.MemoryHandle()}, "INVALID_HANDLE"),
        ({"manifest": pb.ManifestReference()}, "EMPTY_UPDATE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_refused_and_leaves_nothing_in_hand(
    start: StartPair, changes: dict[str, object], reason: str
) -> None:
    pair = start(server_info=LORA)
    assert refused(pair, **changes).reason == reason
    pair.assert_untouched()
    assert pair.update("next").state == pb.UPDATE_STATE_COMMITTED


def test_a_sidecar_that_stops_gives_up_what_waits_for_ranks(start: StartPair) -> None:
    pair = start(server_info=LORA)
    waiting = call(pair, 0)
    wait_until(lambda: exists(pair, "load"))
    os.kill(pair.process.pid, signal.SIGTERM)
    assert refusal(waiting).reason == "DRAINING"
