"""When a rank counts as gone: with the last of its calls that is cancelled, and once."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from sidecar.callers import WHOLE_UPDATE, Callers


class Calls:
    """Calls of ranks that wait until they are told to end, and who is gone."""

    def __init__(self) -> None:
        self._callers = Callers()
        self._tasks: list[asyncio.Task[None]] = []
        self.gone: list[tuple[str, int, int]] = []

    async def open(self, update_id: str = "u", rank: int = 0, bucket: int = WHOLE_UPDATE) -> asyncio.Task[None]:
        """A call that is waiting by the time that this returns."""
        key = (update_id, rank, bucket)
        task = asyncio.create_task(self._wait(key, lambda: self.gone.append(key)))
        self._tasks.append(task)
        await asyncio.sleep(0)
        return task

    async def _wait(self, key: tuple[str, int, int], gone: Callable[[], None]) -> None:
        with self._callers.calling(*key, gone):
            await asyncio.Event().wait()

    async def cancel(self, *calls: asyncio.Task[None]) -> None:
        for call in calls:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    def call_that_raises(self, error: Exception) -> None:
        with self._callers.calling("u", 0, WHOLE_UPDATE, lambda: self.gone.append(("u", 0, WHOLE_UPDATE))):
            raise error


def run(story: Callable[[Calls], Coroutine[None, None, None]]) -> None:
    async def life() -> None:
        calls = Calls()
        await story(calls)
        await calls.cancel(*calls._tasks)

    asyncio.run(life())


def test_a_rank_is_gone_with_its_only_call() -> None:
    async def story(calls: Calls) -> None:
        await calls.cancel(await calls.open())
        assert calls.gone == [("u", 0, WHOLE_UPDATE)]

    run(story)


def test_a_rank_is_gone_once_and_with_the_last_of_its_calls() -> None:
    async def story(calls: Calls) -> None:
        first, second, third = [await calls.open() for _ in range(3)]
        await calls.cancel(second, first)
        assert calls.gone == []
        await calls.cancel(third)
        assert calls.gone == [("u", 0, WHOLE_UPDATE)]

    run(story)


def test_calls_of_one_rank_that_are_cancelled_in_one_moment_are_one_death() -> None:
    async def story(calls: Calls) -> None:
        both = [await calls.open() for _ in range(2)]
        for call in both:
            call.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        assert calls.gone == [("u", 0, WHOLE_UPDATE)]

    run(story)


def test_another_bucket_rank_or_update_is_no_reason_to_be_there() -> None:
    async def story(calls: Calls) -> None:
        lost = await calls.open(bucket=1)
        for update_id, rank, bucket in (("u", 0, 0), ("u", 1, 1), ("v", 0, 1), ("u", 0, WHOLE_UPDATE)):
            await calls.open(update_id, rank, bucket)
        await calls.cancel(lost)
        assert calls.gone == [("u", 0, 1)]

    run(story)


def test_a_call_that_is_answered_says_nothing_of_its_rank() -> None:
    async def story(calls: Calls) -> None:
        with pytest.raises(TimeoutError):
            calls.call_that_raises(TimeoutError())
        assert calls.gone == []
        stays = await calls.open()
        with pytest.raises(ValueError, match="an answer"):
            calls.call_that_raises(ValueError("an answer"))
        await calls.cancel(stays)
        assert calls.gone == [("u", 0, WHOLE_UPDATE)]

    run(story)


def test_a_rank_that_came_back_can_go_again() -> None:
    async def story(calls: Calls) -> None:
        for _ in range(2):
            await calls.cancel(await calls.open())
        assert calls.gone == [("u", 0, WHOLE_UPDATE)] * 2

    run(story)
