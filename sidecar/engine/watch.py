"""Knows in the background whether the engine is there, and what it serves.

Invariant: ``info`` of the watched engine is None exactly while it cannot be reached; a server that came back is
asked anew what it is. Looks at ``/model_info`` only, which neither generates a token (as ``/health`` does, and then
answers 503 while paused) nor waits for the scheduler. Uses a connection of its own, so a long load hides nothing.
"""

import asyncio
import logging
from collections.abc import Callable

from sidecar.config import Timeouts
from sidecar.engine.sglang import SGLangEngine
from sidecar.errors import EngineError

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
# One lost look can be a busy tokenizer (it parses large bodies on its event loop); several are not.
MISSES_UNTIL_GONE = 3


class EngineWatch:
    """A loop that looks at one engine."""

    def __init__(self, engine: SGLangEngine, timeouts: Timeouts, on_change: Callable[[], None]) -> None:
        self._engine = engine
        self._eye = SGLangEngine(engine.url, timeouts)
        self._on_change = on_change
        self._misses = 0

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Look once, and tell if anything is different."""
        before = (self._engine.info, self._engine.weight_version)
        try:
            await self._look_at_version()
            if self._engine.info is None:
                self._engine.info = await self._eye.probe()
                logger.info("engine %s: SGLang %s, tp_size %d", self._eye.url, *_named(self._engine))
            self._misses = 0
        except EngineError as error:
            self._missed(error)
        if before != (self._engine.info, self._engine.weight_version):
            self._on_change()

    def close(self) -> None:
        """Let the connection go."""
        self._eye.close()

    async def _look_at_version(self) -> None:
        published = self._engine.num_published
        seen = await self._eye.ask_weight_version()
        if self._engine.num_published == published:  # otherwise the answer may be older than what is known
            self._engine.weight_version = seen

    def _missed(self, error: EngineError) -> None:
        self._misses += 1
        if self._engine.info is not None and self._misses >= MISSES_UNTIL_GONE:
            logger.warning("engine gone: %s", error.message)
            self._engine.gone(error.message)
        elif self._engine.info is None:
            self._engine.problem = error.message


def _named(engine: SGLangEngine) -> tuple[str, int]:
    assert engine.info is not None
    return engine.info.version, engine.info.tp_size
