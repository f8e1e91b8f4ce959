"""Whatever becomes of a fleet's update, rank 0 goes through each gather once, as the trainer's other ranks do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapter.fleet import Asked, Fleet, FleetResult, FleetUpdateFailed, Policy, quorum
from adapter.fleet.policy import ALL_OR_NOTHING
from tests.fakes import FOREVER, Fault
from tests.integration.fleets import ONE_TENSOR, TIMEOUT_S, Trio
from tests.integration.groups import BEGIN, PAUSE, PUBLISH, RECEIVE
from tests.unit.fleet.gathers import Counted, counted

NOTHING = ""


def send(fleet: Fleet, tensors: list[Counted], version: str, *, iterator: bool) -> FleetResult:
    """As a list, or as an iterator of what is told beforehand."""
    pairs = ((tensor.name, tensor) for tensor in tensors)
    specs = [tensor.spec for tensor in tensors] if iterator else None
    return fleet.update_weights(pairs, specs=specs, version=version, timeout=TIMEOUT_S)


@pytest.mark.parametrize("iterator", [False, True])
@pytest.mark.parametrize("policy", [ALL_OR_NOTHING, quorum(2)], ids=str)
@pytest.mark.parametrize("path", [NOTHING, PAUSE, BEGIN, RECEIVE, PUBLISH])
def test_each_gather_is_gone_through_once_wherever_an_engine_fails(
    trio: Trio, path: str, policy: Policy, iterator: bool
) -> None:
    if path:
        trio.pairs[1].engine.fault(path, Fault.REFUSE, times=FOREVER)
    tensors = counted()
    goes_well = policy != ALL_OR_NOTHING or path in (NOTHING, PUBLISH)
    with trio.fleet(policy=policy) as fleet:
        if goes_well:
            left_behind = send(fleet, tensors, trio.v(1), iterator=iterator).left_behind
            assert left_behind == ([trio.targets[1]] if path else [])
        else:
            with pytest.raises(FleetUpdateFailed):
                send(fleet, tensors, trio.v(1), iterator=iterator)
    assert [tensor.times for tensor in tensors] == [1, 1, 1]


def wrong_option(fleet: Fleet, tensors: list[Counted]) -> None:
    fleet.update_weights(((t.name, t) for t in tensors), specs=[t.spec for t in tensors], version="1", pause_mode="no")


def nothing_to_catch_up_with(fleet: Fleet, tensors: list[Counted]) -> None:
    fleet.catch_up((t.name, t) for t in tensors)


def values_that_cannot_be_looked_at(fleet: Fleet, tensors: list[Counted]) -> None:
    fleet.update_weights(
        ((t.name, t) for t in tensors), specs=[t.spec for t in tensors], version="1", check_finite=True
    )


@pytest.mark.parametrize("mistake", [wrong_option, nothing_to_catch_up_with, values_that_cannot_be_looked_at])
def test_a_mistake_of_rank_0_alone_leaves_nobody_in_a_gather(mistake: Callable[[Fleet, list[Counted]], None]) -> None:
    tensors = counted()
    fleet = Fleet(Asked(list), bucket_bytes=ONE_TENSOR, device="cpu")
    with fleet, pytest.raises(ValueError, match=r"pause_mode|published nothing yet|check_finite"):
        mistake(fleet, tensors)
    assert [tensor.times for tensor in tensors] == [1, 1, 1]


@pytest.mark.parametrize("iterator", [False, True])
def test_the_other_ranks_go_through_each_once(iterator: bool) -> None:
    tensors = counted()
    with Fleet(Asked(list), bucket_bytes=ONE_TENSOR, device="cpu") as fleet:
        specs = [tensor.spec for tensor in tensors] if iterator else None
        fleet.take_part(((tensor.name, tensor) for tensor in tensors), specs=specs)
    assert [tensor.times for tensor in tensors] == [1, 1, 1]
