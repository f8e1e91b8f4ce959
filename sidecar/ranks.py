"""What the applier waits for of a trainer's ranks: their buckets, their commits, and their word to publish.

Invariant: every wait is bounded, names the ranks that it was for, and ends at once when one of them gives up.
"""

import asyncio
from collections.abc import Awaitable, Callable

from sidecar import admission, refusals
from sidecar.config import Timeouts
from sidecar.update import Update

Until = Callable[[Callable[[], bool]], Awaitable[None]]
"""Returns once its argument is true."""


class Ranks:
    """The ranks of whatever update is applied."""

    def __init__(self, until: Until, timeouts: Timeouts) -> None:
        self._until = until
        self._timeouts = timeouts

    async def bucket(self, update: Update, bucket: int) -> None:
        """Until every rank has delivered ``bucket`` (committed, past the last); raises ``SyncError``."""
        if bucket == update.num_buckets:
            return await self._wait(update, update.uncommitted, "to commit", self._timeouts.bucket)
        what = "to commit" if update.header.group_name else f"to deliver bucket {bucket}"
        await self._wait(update, lambda: update.waiting_for(bucket), what, self._timeouts.bucket)
        if not update.header.group_name:
            _check_again(update, bucket)
        return None

    async def decision(self, update: Update) -> None:
        """Until every rank has said that the version is to be published; raises ``SyncError``."""
        await self._wait(update, update.unpublished, "to publish", self._timeouts.decide)

    async def _wait(self, update: Update, missing: Callable[[], list[int]], what: str, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._until(lambda: update.abort_request is not None or not missing())
        except TimeoutError:
            raise refusals.missing(update, missing(), what, seconds) from None
        if update.abort_request:
            raise update.abort_request


def _check_again(update: Update, bucket: int) -> None:
    """It was delivered a while ago, perhaps: a handle that has gone kills the engine."""
    for rank, memory in enumerate(update.memories(bucket)):
        admission.check_handles({bucket: memory}, update.manifest, rank, update.placement)
