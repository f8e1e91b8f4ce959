"""LoRA adapters taken out of the engine, and those that it is still at when the wait for them is over.

SGLang takes one call about adapters after the other, and an unload waits, without a limit of its own, for the requests
that use the adapter. A load posted behind it would wait with its memory unread. Invariant: after ``finish`` no unload
that was begun here is under way.
"""

from typing import Protocol

from sidecar import refusals
from sidecar.errors import EngineTimeout


class Engine(Protocol):
    """What unloading needs of an engine; each call is bounded and raises ``EngineError``."""

    @property
    def epoch(self) -> int:
        """Counts its lives."""

    async def unload_adapter(self, name: str) -> bool:
        """Take one out, once the requests that use it have ended; whether it was there."""


class LoraUnloads:
    """One engine's."""

    def __init__(self, engine: Engine, limit_s: float) -> None:
        self._engine = engine
        self._limit_s = limit_s
        self._unfinished: set[tuple[int, str]] = set()
        """By the engine's epoch and the adapter's name."""

    async def unload(self, name: str) -> bool:
        """Take one out; whether it was there."""
        await self.finish(but=name)
        return await self._unload(name)

    async def finish(self, but: str = "") -> None:
        """Wait for what is under way; raises ``EngineError`` if that takes too long again."""
        self._unfinished = {key for key in self._unfinished if key[0] == self._engine.epoch}
        for _, name in sorted(self._unfinished):
            if name != but:
                await self._unload(name)

    async def _unload(self, name: str) -> bool:
        key = (self._engine.epoch, name)
        try:
            was_there = await self._engine.unload_adapter(name)
        except EngineTimeout as late:
            self._unfinished.add(key)
            raise refusals.lora_in_use(name, late, self._limit_s) from late
        was_there |= key in self._unfinished
        self._unfinished.discard(key)
        return was_there
