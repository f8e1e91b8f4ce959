"""Knows in the background whether the engine is there, and what it serves.

Invariant: ``info`` of the watched engine is None exactly while it cannot be reached; a server that came back is
asked anew what it is. Looks at ``/model_info`` only, which neither generates a token (as ``/health`` does, and then
answers 503 while paused) nor waits for the scheduler.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from sidecar.engine.sglang import SGLangEngine
from sidecar.errors import EngineDown, EngineError, EngineLost

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
# One lost look can be a busy tokenizer (it parses large bodies on its event loop); several are not.
MISSES_UNTIL_GONE = 3
FIRST_LOOK_S = 2.0


class EngineWatch:
    """A loop that looks at one engine."""

    def __init__(self, engine: SGLangEngine, on_change: Callable[[], None]) -> None:
        self._engine = engine
        self._on_change = on_change
        self._misses = 0
        self._knows = asyncio.Event()
        """Set by the first look that a busy tokenizer cannot have failed."""

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_S)

    async def first_look(self, seconds: float) -> None:
        """Until a look has told whether the engine is there; no longer than ``seconds``, and than two."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, FIRST_LOOK_S)):
                await self._knows.wait()

    async def look(self) -> None:
        """Look once, and tell if anything is different."""
        before = self._seen()
        try:
            if self._engine.info is None or self._engine.suspect or self._misses:  # restarted between two looks?
                info = await self._engine.probe()
                logger.info("engine %s: SGLang %s, tp_size %d", self._engine.url, info.version, info.tp_size)
            else:
                await self._engine.look()
            self._misses = 0
            self._knows.set()
        except EngineError as error:
            self._missed(error)
        if before != self._seen():
            self._on_change()

    def _seen(self) -> tuple[object, ...]:
        return self._engine.info, self._engine.epoch, self._engine.weight_version, self._engine.held

    def _missed(self, error: EngineError) -> None:
        self._misses += 1
        if self._misses >= MISSES_UNTIL_GONE or not isinstance(error, EngineLost):
            self._knows.set()
        if isinstance(error, EngineDown):
            self._engine.died()
        if self._engine.info is None:
            self._engine.problem = error.message
        elif self._misses >= MISSES_UNTIL_GONE:
            logger.warning("engine gone: %s", error.message)
            self._engine.gone(error.message)
