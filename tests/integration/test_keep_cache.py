"""An update that leaves the prefix cache as it is."""

import grpc
import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, NO_SESSIONS, SESSIONS, Pair, expected_posts, refusal

FLUSH = "/flush_cache"


def request(pair: Pair, update_id: str, rank: int, mode: pb.PauseMode.ValueType) -> pb.UpdateWeightsRequest:
    made = pair.request(update_id, rank)
    made.update.keep_cache, made.update.pause_mode = True, mode
    return made


def kept(pair: Pair, update_id: str, mode: pb.PauseMode.ValueType, *, verify: bool = False) -> pb.UpdateOutcome:
    requests = [request(pair, update_id, rank, mode) for rank in range(2)]
    for one in requests:
        one.update.verify = verify
    outcomes = [answer.result(ANSWER_S).outcome for answer in [pair.send(one) for one in requests]]
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


@pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)
@pytest.mark.parametrize("mode", ["RETRACT", "IN_PLACE", "ABORT"])
def test_a_cache_that_is_to_be_kept_is_not_flushed_and_nobody_is_warned(
    pair: Pair, mode: str, request: pytest.FixtureRequest
) -> None:
    outcome = kept(pair, f"kept in {mode}", pb.PauseMode.Value(f"PAUSE_MODE_{mode}"))
    assert (outcome.state, outcome.cache_flushed, list(outcome.notes)) == (pb.UPDATE_STATE_COMMITTED, False, [])
    assert pb.PHASE_FLUSH not in [phase.phase for phase in outcome.phases]
    expected = expected_posts(request.node.callspec.params["pair"], 1)
    assert pair.posts() == [path for path in expected if path != FLUSH]
    assert pair.engine.weight_version == f"version of kept in {mode}"
    assert not pair.is_paused()


def test_it_is_verified_all_the_same(start: StartPair) -> None:
    outcome = kept(start(), "verified", pb.PAUSE_MODE_RETRACT, verify=True)
    assert (outcome.verification, outcome.cache_flushed) == (pb.VERIFICATION_CONSISTENT, False)


@pytest.mark.parametrize(
    ("pair", "mode"), [(SESSIONS, "DRAIN"), (SESSIONS, "NONE"), (NO_SESSIONS, "DRAIN")], indirect=["pair"]
)
def test_a_pause_that_flushes_to_see_whether_the_engine_is_idle_is_refused(pair: Pair, mode: str) -> None:
    refused = refusal(pair.send(request(pair, "drained", 1, pb.PauseMode.Value(f"PAUSE_MODE_{mode}"))))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PAUSE_MODE_UNSUITABLE")
    assert f"rank 1: pause mode {mode.lower()} sees by a flush that the engine is idle" in refused.message
    assert "choose retract, in_place or abort, or leave keep_cache out" in refused.message
    pair.assert_untouched()


@pytest.mark.parametrize("pair", [NO_SESSIONS], indirect=True)
def test_without_a_pause_a_bucket_that_carries_its_version_flushes_nothing_either(pair: Pair) -> None:
    outcome = kept(pair, "unpaused", pb.PAUSE_MODE_NONE)
    assert (outcome.cache_flushed, list(outcome.notes)) == (False, [])
    assert FLUSH not in pair.posts()


def test_ranks_that_differ_about_the_cache_are_told_so(pair: Pair) -> None:
    waiting = pair.send(request(pair, "differ about the cache", 0, pb.PAUSE_MODE_RETRACT))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    for refused in (refusal(pair.send(pair.request("differ about the cache", 1))), refusal(waiting)):
        assert refused.reason == "RANKS_DIFFER"
        assert "ranks 0 and 1 differ: keep_cache True against False" in refused.message
    pair.assert_untouched()
