"""What can go wrong during an update, and how the update may end then.

Owns the kinds, their weights, and what is done to the processes. Invariant: when a fault's `during` returns, nothing is
stopped any more, and there is a sidecar to ask. Dead ranks and a dead server are replaced once the update has ended.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.soak.draw import Fault
from tests.soak.prediction import ABORTED, COMMITTED, FAILED
from tests.soak.world import TP_SIZE, World, held

PATIENT_S = 60.0
"""A client's deadline where it is to play no part."""
_GIVE_UP_S = 60.0

During = Callable[[World, Fault, int], None]


def _nothing(world: World, fault: Fault, step: int) -> None:
    """The ranks do it to themselves."""


def _kill_rank(world: World, fault: Fault, step: int) -> None:
    time.sleep(fault.delay_s)
    world.ranks[fault.rank].kill()


def _stop_rank_for_a_moment(world: World, fault: Fault, step: int) -> None:
    rank = world.ranks[fault.rank]
    if rank.wait_stopped(_GIVE_UP_S):
        time.sleep(fault.hold_s)
        rank.send_signal(signal.SIGCONT)


def _stop_rank_until_the_others_gave_up(world: World, fault: Fault, step: int) -> None:
    rank, other = world.ranks[fault.rank], world.ranks[1 - fault.rank]
    if rank.wait_stopped(_GIVE_UP_S):
        other.answers_within(PATIENT_S + _GIVE_UP_S)
        rank.send_signal(signal.SIGCONT)


def _kill_sidecar(world: World, fault: Fault, step: int) -> None:
    time.sleep(fault.delay_s)
    world.signal_sidecar(signal.SIGKILL)
    world.restart_sidecar(step)


def _drain_sidecar(world: World, fault: Fault, step: int) -> None:
    time.sleep(fault.delay_s)
    world.signal_sidecar(signal.SIGTERM)
    world.restart_sidecar(step)


def _stop_sidecar(world: World, fault: Fault, step: int) -> None:
    time.sleep(fault.delay_s)
    with held(lambda: world.signal_sidecar(signal.SIGSTOP), lambda: world.signal_sidecar(signal.SIGCONT)):
        time.sleep(fault.hold_s)


def _stop_engine(world: World, fault: Fault, step: int) -> None:
    time.sleep(fault.delay_s)
    with held(lambda: world.signal_engine(signal.SIGSTOP), lambda: world.signal_engine(signal.SIGCONT)):
        time.sleep(fault.hold_s)


def _kill_engine(world: World, fault: Fault, step: int) -> None:
    time.sleep(fault.delay_s)
    world.kill_engine()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of fault."""

    weight: int
    """How many of a thousand updates it comes with."""
    outcomes: frozenset[str]
    """How the update may end."""
    during: During = _nothing
    act: str = ""
    """What the fault's rank does by itself; see `tests.soak.rank`."""
    bucketed: bool = False
    """Whether it is meant to come between buckets."""
    timeout_s: Callable[[Fault], float] = lambda _: PATIENT_S
    """The ranks' deadline."""


_UNTOUCHED = frozenset({ABORTED})
_BROKEN_OFF = frozenset({ABORTED, FAILED})
_UNHARMED = frozenset({COMMITTED})
_ANY = frozenset({COMMITTED, ABORTED, FAILED})
_HASTY_S = 0.002

KINDS: dict[str, Kind] = {
    "rank killed before its call": Kind(weight=3, outcomes=_UNTOUCHED, act="kill at once", timeout_s=lambda _: 5.0),
    "rank killed between buckets": Kind(weight=5, outcomes=_BROKEN_OFF, act="kill", bucketed=True),
    "rank killed at any moment": Kind(weight=5, outcomes=_ANY, during=_kill_rank, timeout_s=lambda _: 20.0),
    "rank stopped for a moment": Kind(
        weight=3, outcomes=_UNHARMED, act="stop", during=_stop_rank_for_a_moment, bucketed=True
    ),
    "rank stopped for too long": Kind(
        weight=3, outcomes=_BROKEN_OFF, act="stop", during=_stop_rank_until_the_others_gave_up, bucketed=True
    ),
    "rank raises": Kind(weight=4, outcomes=_BROKEN_OFF, act="raise", bucketed=True),
    "ranks differ": Kind(weight=3, outcomes=_UNTOUCHED, act="reshape"),
    "clients too hasty": Kind(weight=4, outcomes=_ANY, timeout_s=lambda fault: _HASTY_S + fault.delay_s / 2),
    "sidecar killed": Kind(weight=5, outcomes=_ANY, during=_kill_sidecar),
    "sidecar drained": Kind(weight=3, outcomes=_ANY, during=_drain_sidecar),
    "sidecar stopped": Kind(weight=3, outcomes=_UNHARMED, during=_stop_sidecar),
    "engine stopped": Kind(weight=4, outcomes=_UNHARMED, during=_stop_engine),
    "engine killed": Kind(weight=5, outcomes=frozenset({COMMITTED, ABORTED}), during=_kill_engine),
}
WEIGHTS = {name: kind.weight for name, kind in KINDS.items()}


def act_of(fault: Fault | None, rank: int, num_tensors: int) -> dict[str, str | int]:
    """The part of a rank's command that says how it misbehaves."""
    if fault is None or rank != fault.rank or not KINDS[fault.kind].act:
        return {"act": "", "at": -1}
    act, _, at_once = KINDS[fault.kind].act.partition(" ")
    if at_once:
        return {"act": act, "at": 0}
    return {"act": act, "at": min(int(fault.at * num_tensors), num_tensors - 1)}


assert sum(WEIGHTS.values()) == 50, "a fault every 20 of a thousand updates"
assert TP_SIZE == 2
