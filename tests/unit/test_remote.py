"""Ranks beside rank 0 of a trainer that shares no memory with its engine: what they are told, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pytest
import torch

from adapter.credentials import NO_CREDENTIALS
from adapter.errors import RanksMissing, SidecarUnreachable, UpdateAborted, UpdateFailed
from adapter.remote import RANKS_APART_S, RemoteUpdates
from adapter.wire import UpdateResult
from sidecar.v1 import weight_sync_pb2 as pb

WEIGHTS = [("w", torch.zeros(4))]
ABORTED, FAILED, COMMITTED = pb.UPDATE_STATE_ABORTED, pb.UPDATE_STATE_FAILED, pb.UPDATE_STATE_COMMITTED
Answer = Callable[[], pb.GetUpdateResponse]


@dataclass
class Sidecar:
    """Answers one question after the other as planned, the last answer for ever."""

    script: list[Answer] = field(default_factory=list)
    given_up: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, update_id: str) -> pb.GetUpdateResponse:
        answer = (self.script.pop(0) if len(self.script) > 1 else self.script[0])()
        answer.outcome.update_id = answer.outcome.weight_version = update_id
        return answer


def ended(state: pb.UpdateState.ValueType, ago_s: float = 0.0, error: str = "") -> Answer:
    """An end so long before now."""
    at = time.monotonic() - ago_s

    def answer() -> pb.GetUpdateResponse:
        told = pb.GetUpdateResponse(outcome=pb.UpdateOutcome(state=state, error=error))
        told.ended_ago.FromNanoseconds(round((time.monotonic() - at) * 1e9))
        return told

    return answer


def going_on() -> pb.GetUpdateResponse:
    return pb.GetUpdateResponse(outcome=pb.UpdateOutcome(state=pb.UPDATE_STATE_APPLYING))


def unknown() -> pb.GetUpdateResponse:
    raise SidecarUnreachable("it is restarted")


@pytest.fixture
def sidecar() -> Sidecar:
    return Sidecar()


def remote(sidecar: Sidecar, rank: int) -> RemoteUpdates:
    return RemoteUpdates(
        "unix:/nowhere/sidecar.sock",
        rank,
        sidecar.ask,
        lambda update_id, why: sidecar.given_up.append((update_id, why)),
        credentials=NO_CREDENTIALS,
        bucket_bytes=1 << 20,
        staging_buffers=2,
        device=torch.device("cpu"),
        fused_groups=(),
    )


@pytest.fixture
def rank_1(sidecar: Sidecar) -> Iterator[RemoteUpdates]:
    with closing(remote(sidecar, rank=1)) as rank:
        yield rank


def follow(rank: RemoteUpdates, timeout: float = 10.0) -> UpdateResult:
    return rank.update(WEIGHTS, None, version="1", update_id="u", timeout=timeout)


def test_another_rank_is_told_what_rank_0_is_told(sidecar: Sidecar, rank_1: RemoteUpdates) -> None:
    sidecar.script = [unknown, going_on, ended(COMMITTED)]
    assert follow(rank_1).weight_version == "u"


@pytest.mark.parametrize(("state", "kind"), [(ABORTED, UpdateAborted), (FAILED, UpdateFailed)])
def test_an_update_that_ended_before_this_rank_came_is_its_own(
    sidecar: Sidecar, rank_1: RemoteUpdates, state: pb.UpdateState.ValueType, kind: type[Exception]
) -> None:
    sidecar.script = [ended(state, ago_s=0.5, error="the engine refuses to pause")]
    with pytest.raises(kind, match="refuses to pause"):
        follow(rank_1)


def test_what_ended_long_before_is_of_another_attempt(sidecar: Sidecar, rank_1: RemoteUpdates) -> None:
    sidecar.script = [ended(ABORTED, RANKS_APART_S + 5.0, "of before"), going_on, ended(COMMITTED)]
    assert follow(rank_1).weight_version == "u"


def test_an_end_that_this_rank_was_told_of_is_not_told_again_for_the_next_attempt(
    sidecar: Sidecar, rank_1: RemoteUpdates
) -> None:
    sidecar.script = [first := ended(ABORTED, error="the first")]
    with pytest.raises(UpdateAborted, match="the first"):
        follow(rank_1)
    sidecar.script = [first, first, going_on, ended(FAILED, ago_s=-1.0, error="the second")]
    with pytest.raises(UpdateFailed, match="the second"):
        follow(rank_1)


def test_an_update_that_rank_0_never_brought_ends_with_this_ranks_time(sidecar: Sidecar, rank_1: RemoteUpdates) -> None:
    sidecar.script = [unknown]
    with pytest.raises(RanksMissing, match=r"rank 0 has not brought update 'u' to its end within 0 s"):
        follow(rank_1, timeout=0.2)


def test_a_rank_that_gives_up_has_the_others_told(sidecar: Sidecar, rank_1: RemoteUpdates) -> None:
    rank_1.give_up(WEIGHTS, None, "u", RuntimeError("out of memory"))
    assert sidecar.given_up == [("u", "RuntimeError: out of memory")]


def test_rank_0_that_never_reached_the_sidecar_has_the_others_told(sidecar: Sidecar) -> None:
    sidecar.script = [unknown]
    with closing(remote(sidecar, rank=0)) as rank_0, pytest.raises(SidecarUnreachable):
        follow(rank_0, timeout=2.0)
    ((update_id, why),) = sidecar.given_up
    assert update_id == "u"
    assert "cannot be reached" in why


def test_what_the_sidecar_tells_of_rank_0s_update_is_left_as_it_is(sidecar: Sidecar) -> None:
    sidecar.script = [ended(FAILED, ago_s=-1.0, error="half of it")]
    with closing(remote(sidecar, rank=0)) as rank_0, pytest.raises(SidecarUnreachable):
        follow(rank_0, timeout=2.0)
    assert sidecar.given_up == []


def test_a_rank_that_gave_up_is_told_how_the_next_attempt_ends_not_of_its_own_word(
    sidecar: Sidecar, rank_1: RemoteUpdates
) -> None:
    own = ended(ABORTED, error="rank 1 aborted it")
    rank_1.give_up(WEIGHTS, None, "u", RuntimeError("out of memory"))
    sidecar.script = [own, going_on, ended(COMMITTED)]
    assert follow(rank_1).weight_version == "u"
