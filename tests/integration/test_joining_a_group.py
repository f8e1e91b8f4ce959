"""The engine joins and leaves groups: one at a time, not during an update, and what if it does not answer."""

from __future__ import annotations

import time

import grpc
import pytest

from adapter.launch import free_port
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.groups import (
    DESTROY,
    INIT,
    begin,
    join,
    joined,
    leave,
    prepare,
    ready,
    whole_update,
)
from tests.integration.support import ANSWER_S, Pair, failed_call, refusal, wait_until


def restart(pair: Pair) -> None:
    """Long enough for the sidecar to notice."""
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    pair.engine.restart()
    pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)


def test_another_group_is_joined_once_the_first_is_left(pair: Pair) -> None:
    joined(pair, "one")
    join(pair, "two").result(ANSWER_S)
    assert pair.posts() == [DESTROY, INIT]
    assert pair.bodies(DESTROY) == [{"group_name": "one"}]
    assert pair.engine.groups == ["two"]
    assert pair.status().group.group_name == "two"
    assert refusal(begin(pair, "one")).reason == "GROUP_UNKNOWN"


def test_a_group_is_left_by_its_name_alone(pair: Pair) -> None:
    joined(pair, "left by name")
    assert leave(pair, "another") is False  # the engine is asked: a sidecar before this one may have had it joined
    assert (pair.posts(), pair.engine.groups) == ([DESTROY], ["left by name"])
    assert leave(pair, "left by name") is True
    assert (leave(pair, "left by name"), pair.engine.groups) == (False, [])
    assert not pair.status().HasField("group")


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"backend": "nccl"}, grpc.StatusCode.FAILED_PRECONDITION, "GROUP_UNSUITABLE"),
        ({"backend": "mpi"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_GROUP"),
        ({"world_size": 2}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_GROUP"),
        ({"master_address": "\n"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_GROUP"),
        ({"master_port": 1 << 31}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_GROUP"),
    ],
)
def test_a_group_that_the_engine_cannot_be_in_is_refused_before_it_hears_of_it(
    pair: Pair, changes: dict[str, object], code: grpc.StatusCode, reason: str
) -> None:
    joined(pair, "stays")
    refused = refusal(join(pair, "unsuitable", **changes))  # type: ignore[arg-type]
    assert (refused.code, refused.reason) == (code, reason)
    assert (pair.posts(), pair.engine.groups) == ([], ["stays"])


def test_an_engine_never_hears_of_a_store_that_cannot_be_reached_and_would_be_tried_for_half_an_hour(
    pair: Pair,
) -> None:
    refused = refusal(join(pair, "unreachable", master_port=free_port()))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GROUP_UNREACHABLE")
    assert "the trainer's store at 127.0.0.1:" in refused.message
    assert INIT not in pair.posts()
    for address in ("no-such-host.invalid", "two..dots", "x" * 64):
        assert refusal(join(pair, "nowhere", master_address=address)).reason == "GROUP_UNREACHABLE"
    assert INIT not in pair.posts()


def test_an_engine_on_a_gpu_takes_nccl(cuda_pair: Pair) -> None:
    join(cuda_pair, "on gpus", backend="nccl").result(ANSWER_S)
    assert cuda_pair.engine.groups == ["on gpus"]
    assert leave(cuda_pair, "on gpus")


def test_what_sglang_refuses_is_told_in_its_words_and_costs_nothing(pair: Pair) -> None:
    pair.engine.fault(INIT, Fault.REFUSE, message="Failed to initialize custom process group: no route.")
    refused = refusal(join(pair, "refused"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_REFUSED")
    assert "no route" in refused.message
    status = pair.status()
    assert (status.state, status.HasField("group")) == (pb.SIDECAR_STATE_READY, False)


def test_no_group_is_joined_or_left_while_an_update_is_in_hand(pair: Pair) -> None:
    ready(pair, "over a group in hand")
    pair.mark()
    refused = refusal(join(pair, "meanwhile"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "UPDATE_IN_PROGRESS")
    request = pb.DestroyWeightsUpdateGroupRequest(group_name="over a group in hand")
    assert refusal(pair.rpc.DestroyWeightsUpdateGroup.future(request, timeout=ANSWER_S)).reason == "UPDATE_IN_PROGRESS"
    assert pair.posts() == []
    assert pair.commit("over a group in hand", 0).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_no_update_begins_while_a_group_is_joined(pair: Pair) -> None:
    pair.engine.fault(INIT, Fault.HANG)
    joining = join(pair, "slow to join")
    wait_until(lambda: pair.engine.num_hanging == 1)
    refused = refusal(begin(pair, "too early", tp_size=2, group_name=""))
    assert refused.reason == "UPDATE_IN_PROGRESS"
    assert "because joining group 'slow to join' is in hand" in refused.message
    pair.engine.release()
    joining.result(ANSWER_S)
    assert whole_update(pair, "joined in time").state == pb.UPDATE_STATE_COMMITTED


def test_a_caller_that_goes_while_the_engine_joins_leaves_its_place_taken_until_that_is_over(pair: Pair) -> None:
    """SGLang goes on joining; a second one must not be joined on top."""
    pair.engine.fault(INIT, Fault.HANG)
    joining = join(pair, "abandoned")
    wait_until(lambda: pair.engine.num_hanging == 1)
    joining.cancel()
    pair.status()
    time.sleep(0.2)
    assert refusal(join(pair, "second")).reason == "UPDATE_IN_PROGRESS"
    pair.engine.release()
    wait_until(lambda: pair.status().group.group_name == "abandoned")
    join(pair, "second").result(ANSWER_S)
    assert pair.engine.groups == ["second"]


def test_an_engine_that_does_not_answer_as_it_joins_is_fenced_until_a_complete_update(start: StartPair) -> None:
    pair = start("--group-timeout", "0.5")
    pair.engine.fault(INIT, Fault.HANG)
    refused = refusal(join(pair, "never complete"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_LOST")
    status = pair.status()
    assert not status.HasField("group")
    assert refusal(begin(pair, "never complete")).reason in ("GROUP_UNKNOWN", "ENGINE_UNREACHABLE")
    pair.engine.release()
    status = pair.wait_for(pb.SIDECAR_STATE_FENCED)
    assert "out of service until a complete update: the engine did not answer while it joined group" in status.reason
    assert pair.update("heals").state == pb.UPDATE_STATE_COMMITTED
    pair.wait_for(pb.SIDECAR_STATE_READY)


def test_a_group_that_the_engine_may_have_joined_is_left_before_the_next(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(INIT, Fault.LOSE_REPLY)
    assert refusal(join(pair, "perhaps")).reason == "ENGINE_LOST"
    assert (pair.engine.groups, pair.status().HasField("group")) == (["perhaps"], False)
    assert pair.status().state == pb.SIDECAR_STATE_FENCED
    assert refusal(begin(pair, "perhaps")).reason == "GROUP_UNKNOWN"
    assert whole_update(pair, "surely").state == pb.UPDATE_STATE_COMMITTED
    assert pair.engine.groups == ["surely"]
    assert pair.status().state == pb.SIDECAR_STATE_READY


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.LOSE_REPLY, Fault.CUT])
def test_a_group_that_cannot_be_left_in_order_stands_in_the_way_of_no_other(start: StartPair, fault: Fault) -> None:
    pair = start()
    joined(pair, "stuck")
    pair.engine.fault(DESTROY, fault)
    assert leave(pair, "stuck") is (fault is not Fault.REFUSE)
    assert whole_update(pair, "next").state == pb.UPDATE_STATE_COMMITTED
    assert pair.status().group.group_name == "next"


def test_a_group_goes_with_the_engines_life(start: StartPair) -> None:
    pair = start()
    joined(pair, "old life")
    restart(pair)
    assert not pair.status().HasField("group")
    refused = refusal(begin(pair, "old life"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GROUP_UNKNOWN")
    assert "the engine is in no group, not in 'old life'" in refused.message
    assert whole_update(pair, "new life").state == pb.UPDATE_STATE_COMMITTED


def test_an_engine_that_dies_as_it_joins_is_no_member_when_it_is_back(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(INIT, Fault.DIE_AFTER)
    assert failed_call(join(pair, "killed")).code() is grpc.StatusCode.INTERNAL
    pair.engine.restart()
    pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)
    assert not pair.status().HasField("group")


def test_an_engine_that_is_restarted_between_begin_and_prepare_ends_the_update(start: StartPair) -> None:
    pair = start()
    joined(pair, "restarted")
    begin(pair, "restarted").result(ANSWER_S)
    restart(pair)
    assert pair.outcome("restarted").error_reason == "ENGINE_RESTARTED"
    assert refusal(prepare(pair, "restarted")).reason == "ENGINE_RESTARTED"
