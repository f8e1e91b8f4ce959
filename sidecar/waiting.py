"""Calls that wait for something of an update.

Invariant: every call ends, with what it waited for, with its time, or with its caller; the last two have consequences
for the update, which whoever owns it draws.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from sidecar import refusals
from sidecar.callers import Callers
from sidecar.errors import SyncError
from sidecar.update import Update, UpdateState

LATENESS_S = 1.0
"""A call that breaks off so close to its deadline met that: clients count from when they sent, we from its arrival."""

Gone = Callable[[Update, int, int], None]
"""Told of the last call for a rank's bucket that was cut off."""
Late = Callable[[Update, float], None]
"""Told of a call whose seconds are over."""


class Waiting:
    """Everyone's, on one event loop."""

    def __init__(self, gone: Gone, late: Late) -> None:
        self._gone = gone
        self._late = late
        self._callers = Callers()
        self._change = asyncio.Event()
        self._over = asyncio.Event()
        """Set once the update in hand has ended: most callers wait for nothing else."""

    def begin(self) -> None:
        """Another update is in hand."""
        self._over = asyncio.Event()

    def end(self) -> None:
        """It has ended."""
        self._over.set()

    def look_again(self) -> None:
        """Wake everyone who waits."""
        self._change.set()
        self._change = asyncio.Event()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Returns once it has, as of some ``look_again``."""
        while not happened():
            await self._change.wait()

    async def until_over(self, update: Update) -> None:
        """Only the update in hand has not ended yet."""
        if not update.state.ended:
            await self._over.wait()

    async def call(
        self,
        update: Update,
        rank: int,
        bucket: int,
        happened: Awaitable[None],
        budget_s: float,
        too_late: Callable[[Update], SyncError] | None = None,
    ) -> None:
        """One call of a rank's, about ``bucket`` or ``callers.WHOLE_UPDATE``; raises if its time is over meanwhile.

        ``too_late``: what to raise when the deadline passes, for a wait whose deadline has no consequences.
        """
        nearly_over = time.monotonic() + budget_s - min(LATENESS_S, budget_s / 2)

        def broke_off() -> None:
            if time.monotonic() < nearly_over:
                self._gone(update, rank, bucket)
            elif too_late is None:  # gRPC was faster than we were to see that its time was over
                self._late(update, budget_s)

        with self._callers.calling(update.id, rank, bucket, broke_off):
            try:
                async with asyncio.timeout(budget_s):
                    await happened
            except TimeoutError:
                if too_late:
                    raise too_late(update) from None
                self._late(update, budget_s)
                if update.state is UpdateState.APPLYING:
                    raise refusals.still_applying(update) from None
