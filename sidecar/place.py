"""The one place of what the engine has in hand: an update, or another task of the sidecar's.

Invariant: never both, and never two.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sidecar import refusals
from sidecar.errors import SyncError
from sidecar.header import Header
from sidecar.update import Update

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Place:
    """One engine's."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._update: Update | None = None
        self._claimed_by = ""
        self._work: asyncio.Task[Any] | None = None
        self._on_change = on_change

    @property
    def update(self) -> Update | None:
        """In hand, from its first rank's arrival to its end."""
        return self._update

    def take(self, update: Update) -> None:
        """It is in hand, until ``leave``; ``check_free`` was asked before."""
        assert self._update is None, "one update is in hand at a time"
        assert not self._claimed_by, "and nothing beside it"
        self._update = update

    def leave(self) -> None:
        """The update has ended."""
        self._update = None

    def check_free(self, header: Header) -> None:
        """Raise ``UpdateConflict`` unless that update may begin."""
        if self.update:
            raise refusals.in_progress(self.update, header)
        if self._claimed_by:
            raise refusals.busy(f"update {header.update_id!r} (rank {header.rank})", self._claimed_by)

    def claim(self, by: str) -> None:
        """Take it for another task, until ``release``; raises ``UpdateConflict``."""
        if self.update or self._claimed_by:
            raise refusals.busy(by, self._claimed_by or f"update {self.update and self.update.id!r}")
        self._claimed_by = by

    def release(self) -> None:
        """Updates may come again."""
        self._claimed_by = ""

    async def claiming(self, by: str, act: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """``act`` in the place of an update, to its end though the caller goes: the engine goes on with it, too."""
        self.claim(by)

        async def to_its_end() -> T:
            try:
                return await act()
            finally:
                self.release()
                self._on_change()

        self._work = work = asyncio.create_task(to_its_end(), name=by)
        work.add_done_callback(_looked_at)
        return await asyncio.shield(work)

    async def ended(self, seconds: float) -> bool:
        """Whether what is claimed by ``claiming`` has ended, by then at the latest."""
        if self._work is None:
            return True
        done, _ = await asyncio.wait([self._work], timeout=seconds)
        return bool(done)


def _looked_at(work: asyncio.Task[Any]) -> None:
    """Whoever called may be gone: what was refused then concerns nobody, but a defect must not vanish."""
    error = None if work.cancelled() else work.exception()
    if error is not None and not isinstance(error, SyncError):
        logger.error("%s: a defect in the sidecar", work.get_name(), exc_info=error)
