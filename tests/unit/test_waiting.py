"""How a call's wait ends, and what that does to the update: not even a cancelled call is without consequences."""

import asyncio
from dataclasses import dataclass, field

import pytest

from sidecar import refusals
from sidecar.callers import WHOLE_UPDATE
from sidecar.errors import Reason, SyncError
from sidecar.header import Header
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.update import Update, UpdateState
from sidecar.waiting import Waiting

HEADER = Header(update_id="u", weight_version="v", rank=0, tp_size=2)
MANIFEST = Manifest((BucketSpec(64, (TensorSpec("w", "uint8", (64,), 0, 64),)),))
LONG_S, SHORT_S = 60.0, 0.02


@dataclass
class Consequences:
    """What the owner of the update is told."""

    update: Update = field(default_factory=lambda: Update(HEADER, MANIFEST, MANIFEST.digest()))
    gone: list[tuple[int, int]] = field(default_factory=list)
    late: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = Waiting(
            gone=lambda _, rank, bucket: self.gone.append((rank, bucket)),
            late=lambda _, seconds: self.late.append(seconds),
        )
        self.waiting.begin()

    def call(self, budget_s: float, rank: int = 0) -> "asyncio.Task[None]":
        over = self.waiting.until_over(self.update)
        return asyncio.create_task(self.waiting.call(self.update, rank, WHOLE_UPDATE, over, budget_s))


async def test_a_call_returns_with_what_it_waits_for() -> None:
    told = Consequences()
    calls = [told.call(LONG_S, rank) for rank in range(2)]
    await asyncio.sleep(0)
    told.waiting.end()
    await asyncio.gather(*calls)
    assert (told.gone, told.late) == ([], [])


async def test_a_call_cancelled_in_its_time_has_gone() -> None:
    told = Consequences()
    call = told.call(LONG_S, rank=1)
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert (told.gone, told.late) == ([(1, WHOLE_UPDATE)], [])


async def test_a_call_cancelled_as_its_time_is_over_is_late_and_not_gone() -> None:
    told = Consequences()
    call = told.call(SHORT_S)
    await asyncio.sleep(0)
    await asyncio.sleep(SHORT_S * 0.75)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert (told.gone, told.late) == ([], [SHORT_S])


async def test_a_call_whose_time_is_over_while_ranks_are_missing_tells_that_and_returns() -> None:
    told = Consequences()
    await told.call(SHORT_S)
    assert (told.gone, told.late) == ([], [SHORT_S])


async def test_a_call_whose_time_is_over_while_the_engine_loads_is_told_to_ask_again() -> None:
    told = Consequences()
    for rank in range(2):
        told.update.join(rank)
    told.update.state = UpdateState.APPLYING
    with pytest.raises(SyncError) as refused:
        await told.call(SHORT_S)
    assert refused.value.reason is Reason.STILL_APPLYING


async def test_a_wait_whose_end_has_no_consequences_says_so_itself() -> None:
    told = Consequences()
    told.update.join(0)
    with pytest.raises(SyncError) as refused:
        await told.waiting.call(
            told.update, 0, WHOLE_UPDATE, told.waiting.until_over(told.update), SHORT_S, refusals.still_going_on
        )
    assert refused.value.message == refusals.still_going_on(told.update).message
    assert (told.gone, told.late) == ([], [])


async def test_whoever_waits_looks_again_when_told_to_and_only_then() -> None:
    told, happened = Consequences(), asyncio.Event()
    waiting = asyncio.create_task(told.waiting.until(happened.is_set))
    await asyncio.sleep(0)
    told.waiting.look_again()
    await asyncio.sleep(0)
    happened.set()
    await asyncio.sleep(0)
    assert not waiting.done()
    told.waiting.look_again()
    await asyncio.wait_for(waiting, LONG_S)
