"""Good updates over a group: what is posted when, what it says, and who waits for whom."""

from __future__ import annotations

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.fakes.groups import broadcast_digest
from tests.integration.conftest import StartPair
from tests.integration.groups import (
    BEGIN,
    DESTROY,
    INIT,
    PAUSE,
    PUBLISH,
    RECEIVE,
    RESUME,
    begin,
    group,
    join,
    joined,
    made_ready,
    prepare,
    ready,
    received,
    whole_update,
)
from tests.integration.support import ANSWER_S, NO_SESSIONS, SESSIONS, Pair, manifest, refusal, wait_until

both_kinds = pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)


@both_kinds
def test_nothing_is_posted_before_prepare_nor_received_before_commit(
    pair: Pair, request: pytest.FixtureRequest
) -> None:
    release = request.node.callspec.params["pair"]
    before = pair.engine.weight_version
    join(pair, "in order").result(ANSWER_S)
    assert pair.posts()[-1] == INIT
    assert pair.bodies(INIT)[-1] == {
        "master_address": "127.0.0.1",
        "master_port": pair.engine.port,
        "rank_offset": 1,
        "world_size": 3,
        "group_name": "in order",
        "backend": "gloo",
    }
    pair.mark()
    begin(pair, "in order").result(ANSWER_S)
    assert (pair.posts(), pair.status().state) == ([], pb.SIDECAR_STATE_COLLECTING)
    prepare(pair, "in order").result(ANSWER_S)
    assert pair.posts() == made_ready(release)
    assert (pair.is_paused(), pair.engine.session_open) == (True, release == SESSIONS)
    assert list(pair.status().current_update.waiting_for_ranks) == [0]
    outcome = pair.commit("in order", 0).result(ANSWER_S).outcome
    assert pair.posts() == [*made_ready(release), *received(release, 2), PUBLISH, RESUME]
    assert (outcome.state, outcome.num_posted, outcome.cache_flushed) == (pb.UPDATE_STATE_COMMITTED, 2, True)
    assert outcome.transport == pb.TRANSPORT_DISTRIBUTED
    assert before != pair.engine.weight_version == "version of in order"
    assert not pair.is_paused()


@both_kinds
def test_each_bucket_is_one_receive_that_says_what_comes(pair: Pair, request: pytest.FixtureRequest) -> None:
    whole_update(pair, "bodies over a group")
    expected = {"group_name": "bodies over a group", "load_format": "flattened_bucket", "flush_cache": False}
    if request.node.callspec.params["pair"] == SESSIONS:
        expected["selector"] = "all"
    assert pair.bodies(RECEIVE) == [
        {
            "names": [f"layer.{number}.weight", f"layer.{number}.bias"],
            "dtypes": ["float32", "bfloat16"],
            "shapes": [[2, 3], [4]],
            **expected,
        }
        for number in range(2)
    ]
    tensor = ("layer.1.bias", "bfloat16", [4])
    assert {rank["layer.1.bias"] for rank in pair.engine.loaded} == {
        broadcast_digest("bodies over a group", 2, *tensor)
    }


def test_every_rank_that_takes_part_is_waited_for_and_the_senders_commit_begins_it(pair: Pair) -> None:
    """More of them than the engine has ranks."""
    joined(pair, "three take part")
    for rank in range(3):
        begin(pair, "three take part", rank, tp_size=3).result(ANSWER_S)
    preparing = [prepare(pair, "three take part", rank) for rank in (0, 2)]
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [1])
    assert pair.posts() == []
    for one in (*preparing, prepare(pair, "three take part", 1)):
        one.result(ANSWER_S)
    committing = [pair.commit("three take part", rank) for rank in (1, 2)]
    pair.status()
    assert pair.posts() == [PAUSE, BEGIN]
    committing.append(pair.commit("three take part", 0))
    outcomes = [one.result(ANSWER_S).outcome for one in committing]
    assert {outcome.state for outcome in outcomes} == {pb.UPDATE_STATE_COMMITTED}


def test_prepare_returns_only_when_the_engine_is_paused_and_in_its_session(pair: Pair) -> None:
    joined(pair, "made ready slowly")
    begin(pair, "made ready slowly").result(ANSWER_S)
    pair.engine.fault(PAUSE, Fault.HANG)
    pair.engine.fault(BEGIN, Fault.LATE, delay_s=0.5)
    preparing = prepare(pair, "made ready slowly")
    wait_until(lambda: pair.engine.num_hanging == 1)
    assert (pair.posts(), preparing.done()) == ([PAUSE], False)
    pair.engine.release()
    wait_until(lambda: pair.posts() == [PAUSE, BEGIN])
    assert not preparing.done()
    preparing.result(ANSWER_S)
    assert pair.engine.session_open
    pair.commit("made ready slowly", 0).result(ANSWER_S)


def test_prepare_and_commit_may_be_repeated(pair: Pair) -> None:
    ready(pair, "repeated over a group")
    prepare(pair, "repeated over a group").result(ANSWER_S)
    first = pair.commit("repeated over a group", 0).result(ANSWER_S).outcome
    assert pair.commit("repeated over a group", 0).result(ANSWER_S).outcome == first
    prepare(pair, "repeated over a group").result(ANSWER_S)
    assert pair.posts().count(RECEIVE) == 2


def test_one_group_is_good_for_several_updates(pair: Pair) -> None:
    whole_update(pair, "first of two")
    pair.mark()
    begin(pair, "second of two", group_name="first of two").result(ANSWER_S)
    prepare(pair, "second of two").result(ANSWER_S)
    assert pair.commit("second of two", 0).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert not {INIT, DESTROY} & set(pair.posts())


def test_a_commit_that_was_not_prepared_is_refused_and_changes_nothing(pair: Pair) -> None:
    joined(pair, "unprepared")
    begin(pair, "unprepared").result(ANSWER_S)
    refused = refusal(pair.commit("unprepared", 0))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NOT_PREPARED")
    assert "rank 0 commits update 'unprepared' before the engine was made ready" in refused.message
    assert (pair.posts(), pair.status().state) == ([], pb.SIDECAR_STATE_COLLECTING)
    prepare(pair, "unprepared").result(ANSWER_S)
    assert pair.commit("unprepared", 0).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_memory_has_no_place_in_an_update_over_a_group(pair: Pair) -> None:
    ready(pair, "no memory")
    refused = refusal(pair.push("no memory", 0, 0))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_HEADER")
    assert "rank 0: PushBucket does not suit update 'no memory', which comes over a group" in refused.message
    pair.commit("no memory", 0).result(ANSWER_S)
    for changes in ({"group_name": "no memory"}, {"two_phase": True}):
        request = pair.request("in one call", num_buckets=1)
        request.update.MergeFrom(pb.UpdateHeader(**changes))
        refused = refusal(pair.send(request))
        assert refused.reason == "INVALID_HEADER"
        assert "rank 0: UpdateWeights does not suit update 'in one call'" in refused.message
    request.update.update_id = "long" * (1 << 20)
    assert len(refusal(pair.send(request)).message) < 1000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"manifest": manifest(1)}, "INVALID_TENSOR"),
        ({"group_name": "another"}, "GROUP_UNKNOWN"),
        ({"pause_mode": pb.PAUSE_MODE_NONE}, "PAUSE_MODE_UNSUITABLE"),
        ({"tp_size": (1 << 32) - 1}, "RANK_OUT_OF_RANGE"),
        ({"rank": 1}, "RANK_OUT_OF_RANGE"),
    ],
    ids=str,
)
@both_kinds
def test_what_cannot_come_over_a_group_is_refused_at_the_beginning(
    pair: Pair, changes: dict[str, object], reason: str
) -> None:
    joined(pair, "unsuitable")
    refused = refusal(begin(pair, "unsuitable", **changes))  # type: ignore[arg-type]
    assert refused.reason == reason
    pair.assert_untouched()


def test_ranks_that_count_themselves_differently_end_their_update(pair: Pair) -> None:
    joined(pair, "counts")
    begin(pair, "counts", 0, tp_size=2).result(ANSWER_S)
    refused = refusal(begin(pair, "counts", 1, tp_size=3))
    assert refused.reason == "RANKS_DIFFER"
    assert "tp_size 2 against 3" in refused.message
    pair.assert_untouched()


def test_the_group_is_shown_while_the_engine_is_in_it(pair: Pair) -> None:
    joined(pair, "shown")
    assert pair.status().group == group(pair, "shown")


def test_an_update_over_a_group_can_go_to_an_engine_that_memory_heals_as_well(start: StartPair) -> None:
    pair = start()
    assert whole_update(pair, "broadcast").state == pb.UPDATE_STATE_COMMITTED
    assert pair.update("from memory").state == pb.UPDATE_STATE_COMMITTED
    assert pair.engine.groups == ["broadcast"]
    assert pair.outcome("from memory").transport == pb.TRANSPORT_IPC
