"""Who kept a group from being joined: those who only waited for that one are not sent away with it."""

from __future__ import annotations

import pytest

from adapter.errors import (
    EngineUnreachable,
    IncompatibleSidecar,
    SidecarUnreachable,
    UpdateAborted,
    UpdateRefused,
    WeightSyncError,
)
from adapter.fleet.group import may_come, to_blame
from tests.unit.fleet.conftest import Three

CLOSED = UpdateRefused("Failed to initialize custom process group: Connection closed by peer", reason="ENGINE_REFUSED")
NO_INTERFACE = UpdateRefused("Unable to find address for: eth7", reason="ENGINE_REFUSED")
BUSY = UpdateAborted("update 'u' is in hand", reason="UPDATE_IN_PROGRESS")
NO_STORE = UpdateRefused("the trainer's store cannot be reached", reason="GROUP_UNREACHABLE")
LOST = EngineUnreachable("sent, but no answer", reason="ENGINE_LOST")
NOT_CONNECTED = SidecarUnreachable("DRAINING: it took nothing", reason="DRAINING")
CUT_OFF = SidecarUnreachable("Socket closed")
TOO_OLD = IncompatibleSidecar("UNIMPLEMENTED")
DEADLINE = WeightSyncError("DEADLINE_EXCEEDED")
HANGS = UpdateAborted("the engine did not answer", reason="ENGINE_TIMEOUT")


@pytest.mark.parametrize("own", [SidecarUnreachable("gone"), EngineUnreachable("gone")], ids=str)
def test_whoever_has_a_reason_of_its_own_is_to_blame_however_late_it_is_heard_of(
    three: Three, own: WeightSyncError
) -> None:
    a, b, c = three
    assert to_blame({a: CLOSED, b: own, c: CLOSED}, first={a: CLOSED}) == {b: own}


@pytest.mark.parametrize("refused", [NO_INTERFACE, BUSY, NO_STORE], ids=str)
def test_of_those_that_seem_to_have_waited_the_first_did_not(three: Three, refused: WeightSyncError) -> None:
    a, b, c = three
    assert to_blame({a: CLOSED, b: refused, c: DEADLINE}, first={b: refused}) == {b: refused}


@pytest.mark.parametrize("silence", [DEADLINE, HANGS], ids=str)
def test_whoever_says_nothing_after_the_group_was_closed_hangs(three: Three, silence: WeightSyncError) -> None:
    a, b, c = three
    assert to_blame({a: CLOSED, b: silence, c: CLOSED}, first={}) == {b: silence}


def test_where_all_are_alike_nobody_is_better_than_the_others(three: Three) -> None:
    failed = dict.fromkeys(three, DEADLINE)
    assert to_blame(failed, first={}) == failed


@pytest.mark.parametrize("error", [DEADLINE, HANGS, LOST, CUT_OFF], ids=str)
def test_an_engine_that_may_have_been_asked_and_has_not_answered_may_still_come(error: WeightSyncError) -> None:
    assert may_come(error)


@pytest.mark.parametrize("error", [CLOSED, BUSY, NO_STORE, NOT_CONNECTED, TOO_OLD], ids=str)
def test_an_engine_that_has_answered_or_was_never_asked_does_not_come(error: WeightSyncError) -> None:
    assert not may_come(error)
