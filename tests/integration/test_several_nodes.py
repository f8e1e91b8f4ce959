"""An engine of two nodes: what the sidecar, beside node 0, does not see of the other one's memory is not asked for."""

from __future__ import annotations

import pytest

from sidecar.inspect import describe
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, BUCKET_BYTES, LOAD, NO_SESSIONS, SESSIONS, Pair, refusal

TWO_NODES = {"nnodes": 2}
CONTENT = bytes(BUCKET_BYTES)
every_kind = pytest.mark.parametrize("release", [SESSIONS, NO_SESSIONS])


def requests(pair: Pair, update_id: str, elsewhere: tuple[int, ...], tp_size: int = 2) -> list[pb.UpdateWeightsRequest]:
    """Every rank's; those ``elsewhere`` send from memory of another host."""
    made = []
    for rank in range(tp_size):
        request = pair.request(update_id, rank, tp_size=tp_size)
        if rank in elsewhere:
            request.handles[0].CopyFrom(pair.handle(CONTENT, on_another_host=True))
        made.append(request)
    return made


def commit(pair: Pair, update_id: str, elsewhere: tuple[int, ...], tp_size: int = 2) -> pb.UpdateOutcome:
    answers = [pair.send(request) for request in requests(pair, update_id, elsewhere, tp_size)]
    outcomes = [answer.result(ANSWER_S).outcome for answer in answers]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]


def fail(pair: Pair, update_id: str, elsewhere: tuple[int, ...]) -> pb.UpdateOutcome:
    """Both ranks are told that it failed; its outcome."""
    for answer in [pair.send(request) for request in requests(pair, update_id, elsewhere)]:
        assert refusal(answer).reason == "UPDATE_FAILED"
    return pair.outcome(update_id)


@every_kind
def test_each_node_loads_from_memory_of_its_own(start: StartPair, release: str) -> None:
    pair = start(release=release, server_info=TWO_NODES)
    outcome = commit(pair, "two nodes", elsewhere=(1,))
    assert (outcome.state, list(outcome.notes)) == (pb.UPDATE_STATE_COMMITTED, [])
    assert pair.engine.weight_version == "version of two nodes"
    assert len(pair.engine.loaded[1]) > 1, "rank 1 has loaded what lies there"


def test_ranks_fill_one_node_after_the_other(start: StartPair) -> None:
    pair = start(tp_size=4, server_info=TWO_NODES)
    assert commit(pair, "2 and 3", elsewhere=(2, 3), tp_size=4).state == pb.UPDATE_STATE_COMMITTED
    pair.mark()
    refused = refusal(pair.send(requests(pair, "1 too", (1, 2, 3), tp_size=4)[1]))
    assert refused.reason == "INVALID_HANDLE"
    assert "rank 1, bucket 0: shared memory: cannot see" in refused.message
    assert pair.posts() == []


def test_an_engine_of_one_node_opens_nothing_of_another_host(pair: Pair) -> None:
    refused = refusal(pair.send(requests(pair, "one node", (1,))[1]))
    assert refused.reason == "INVALID_HANDLE"
    assert "rank 1, bucket 0: shared memory: cannot see" in refused.message
    pair.assert_untouched()


def test_buckets_that_follow_one_by_one_need_not_be_seen_either(start: StartPair) -> None:
    pair = start(server_info=TWO_NODES)
    pair.begin("bucketed")
    for bucket in range(2):
        pushes = []
        for rank, handle in enumerate((pair.handle(), pair.handle(CONTENT, on_another_host=True))):
            push = pb.PushBucketRequest(update_id="bucketed", rank=rank, bucket=bucket, handle=handle)
            pushes.append(pair.rpc.PushBucket.future(push, timeout=ANSWER_S))
        for answer in pushes:
            answer.result(ANSWER_S)
    for committed in [pair.commit("bucketed", rank) for rank in range(2)]:
        assert committed.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
    assert pair.counts() == [1] * 4


def test_what_this_host_shows_of_the_other_nodes_memory_is_checked(start: StartPair) -> None:
    """Both nodes are on one host here."""
    pair = start(server_info=TWO_NODES)
    request = pair.request("short", rank=1)
    request.handles[0].shared_memory.size_bytes += 1
    refused = refusal(pair.send(request))
    assert (refused.reason, "bytes, too few for" in refused.message) == ("INVALID_HANDLE", True)
    pair.assert_untouched()


@every_kind
def test_a_lost_reply_is_not_resolved_where_memory_is_on_another_host(start: StartPair, release: str) -> None:
    pair = start(release=release, server_info=TWO_NODES)
    pair.engine.fault(LOAD, Fault.LOSE_REPLY)
    outcome = fail(pair, "lost", elsewhere=(1,))
    (note,) = outcome.notes
    assert "whether ranks [1] have loaded it cannot be told, since their memory is on another host" in note
    status = pair.status()
    assert status.state == pb.SIDECAR_STATE_DIRTY
    assert note in describe(status)
    assert pair.is_paused()
    assert commit(pair, "heals", elsewhere=(1,)).state == pb.UPDATE_STATE_COMMITTED


def test_a_lost_reply_is_resolved_where_both_nodes_are_on_this_host(start: StartPair) -> None:
    pair = start(server_info=TWO_NODES)
    pair.engine.fault(LOAD, Fault.LOSE_REPLY)
    outcome = commit(pair, "lost", elsewhere=())
    assert list(outcome.notes) == ["the answer to the load of bucket 0 was lost; every rank had loaded it"]


def test_a_bucket_that_was_not_opened_here_was_not_loaded_wherever_the_rest_is(start: StartPair) -> None:
    pair = start(server_info=TWO_NODES)
    pair.engine.fault(LOAD, Fault.CUT)
    assert list(fail(pair, "cut", elsewhere=(1,)).notes) == []


def test_a_version_that_came_with_its_bucket_tells_of_every_host(start: StartPair) -> None:
    pair = start(release=NO_SESSIONS, server_info=TWO_NODES)
    pair.engine.fault(LOAD, Fault.LOSE_REPLY)
    sent = requests(pair, "unpaused", (1,))
    for request in sent:
        request.update.pause_mode = pb.PAUSE_MODE_NONE
    for answer in [pair.send(request) for request in sent]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED
