"""What is done about an update that a predecessor of this process has left in the middle.

Where no weight was written, generation goes on with the old weights; otherwise it is held until a complete update.
Invariant: no update begins while this is under way.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from sidecar.errors import EngineError
from sidecar.journal import Entry
from sidecar.served import ServedWeights

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What it takes of an engine; each call is bounded and raises ``EngineError``."""

    def attach(self) -> None:
        """Aim the next steps at the server that answers now."""

    async def end_if_open(self) -> None:
        """Close the session if there is one."""

    async def hold(self) -> None:
        """See that generation is held."""

    async def resume(self) -> None:
        """Let generation go on."""


class Recovery:
    """Deals with each thing that was left, once."""

    def __init__(self, engine: Engine, served: ServedWeights, changed: Callable[[], None]) -> None:
        self._engine = engine
        self._served = served
        self._changed = changed
        self._task: asyncio.Task[None] | None = None

    def engine_seen(self) -> None:
        """The engine answers: begin, if something was left in it."""
        self._served.engine_seen()
        if self._served.recoverable and self._task is None:
            self._task = asyncio.create_task(self._recover(self._served.recoverable), name="recover")

    async def ended(self) -> None:
        """Wait until nothing is under way."""
        if self._task:
            await asyncio.shield(self._task)

    async def _recover(self, left: Entry) -> None:
        try:
            self._engine.attach()
            await self._engine.end_if_open()
            await (self._engine.hold() if left.written else self._engine.resume())
            self._served.recovered(whole=not left.written)
        except EngineError as error:
            logger.warning("update %s of a predecessor cannot be dealt with: %s", left.update_id, error.message)
        self._task = None
        self._changed()
