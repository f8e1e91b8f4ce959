"""An event loop whose clock jumps: waiting costs nothing, and a wait that nothing would ever end is an error.

Invariant: one schedule gives one run; no thread, no real clock.
"""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class NothingWillHappen(AssertionError):
    """Everybody waits, and no deadline is set: the hang that must not be."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time passes only while everybody sleeps."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self._jump))
        self.set_default_executor(_AtOnce())

    def time(self) -> float:
        return self._now

    def _jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    """Never blocks; tells how long it would have."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout is None:
            raise NothingWillHappen
        if not events and timeout:
            self._jump(timeout)
        return events


class _AtOnce(ThreadPoolExecutor):
    """Runs what asyncio would give to a thread."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to who waits for the result
            done.set_exception(error)
        return done
