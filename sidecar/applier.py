"""The sequence that loads a collected update into the engine, and what is done when it breaks off.

    pause -> begin -> one POST per bucket -> end -> flush -> publish -> resume        committed
      |        |                |             |       |         |         |
      |        +-- nothing posted yet: end, resume -> aborted   +---------+-> failed, generation stays paused
      +-- resume -> aborted

Invariants: publish comes last but for resume, so no answer carries a version that was not fully loaded; a POST is
made once; after the first POST a failure leaves generation paused, and so does any failure while the engine is
dirty from an update before.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from sidecar.errors import (
    EngineDown,
    EngineError,
    EngineRefused,
    EngineRestarted,
    EngineUnreachable,
    Reason,
    SyncError,
    UpdateFailed,
)
from sidecar.payload import BucketPayload
from sidecar.update import PauseMode, Phase, Update, UpdateState

logger = logging.getLogger(__name__)

# With retract on 0.5.21 and later, and with abort, a flush works at once or after a step; with requests that wait
# on older releases it never does, and generation is paused meanwhile.
FLUSH_PATIENCE_S = 1.0


class Engine(Protocol):
    """What applying needs of an engine; each call is bounded and raises ``EngineError``."""

    @property
    def epoch(self) -> int:
        """Counts its lives; 0 until it was seen."""

    async def pause(self, mode: PauseMode) -> None:
        """Hold generation."""

    async def begin(self) -> None:
        """Open a session, where the engine has them."""

    async def load(self, entries: Sequence[bytes]) -> None:
        """Load one bucket from one entry per TP rank."""

    async def end(self) -> None:
        """Close the session."""

    async def end_if_open(self) -> None:
        """Close the session if there is one."""

    async def flush(self, patience_s: float) -> bool:
        """Empty the prefix cache, or tell that requests are in the way."""

    async def publish(self, weight_version: str) -> None:
        """Set the version that answers carry."""

    async def resume(self) -> None:
        """Let generation go on."""


WaitForBucket = Callable[[Update, int], Awaitable[None]]
"""Returns when every rank has delivered that bucket (or, past the last, committed); raises when it will not be."""


class Applier:
    """Loads one update after another."""

    def __init__(self, engine: Engine, wait_for_bucket: WaitForBucket, changed: Callable[[], None]) -> None:
        self._engine = engine
        self._wait_for_bucket = wait_for_bucket
        self._changed = changed

    async def apply(self, update: Update, payloads: Sequence[BucketPayload], *, dirty: bool) -> None:
        """Bring ``update`` from APPLYING to an ended state; raises nothing that the engine or a rank can cause.

        ``dirty``: the engine holds mixed weights from before, so it must not generate if this breaks off too.
        """
        try:
            await self._load_all(update, payloads)
            await self._make_visible(update)
        except SyncError as error:
            await self._break_off(update, error, dirty)
        else:
            update.end(UpdateState.COMMITTED)
        self._changed()

    async def _load_all(self, update: Update, payloads: Sequence[BucketPayload]) -> None:
        async with self._phase(update, Phase.PAUSE):
            await self._engine.pause(update.header.pause_mode)
        async with self._phase(update, Phase.BEGIN):
            await self._engine.begin()
        async with self._phase(update, Phase.LOAD):
            for bucket, payload in enumerate(payloads):
                await self._load(update, bucket, payload)
            await self._wait_for_bucket(update, len(payloads))
        async with self._phase(update, Phase.END):
            await self._engine.end()

    async def _load(self, update: Update, bucket: int, payload: BucketPayload) -> None:
        await self._wait_for_bucket(update, bucket)
        entries = [payload.entry(memory) for memory in update.memories(bucket)]
        update.num_posted = bucket + 1
        try:
            await self._engine.load(entries)
        except EngineUnreachable:
            update.num_posted = bucket  # it never left: the memory was not seen
            raise
        update.num_loaded = bucket + 1
        self._changed()

    async def _make_visible(self, update: Update) -> None:
        async with self._phase(update, Phase.FLUSH):
            update.cache_flushed = await self._engine.flush(FLUSH_PATIENCE_S)
        async with self._phase(update, Phase.PUBLISH):
            await self._engine.publish(update.header.weight_version)
        async with self._phase(update, Phase.RESUME):
            await self._engine.resume()

    async def _break_off(self, update: Update, error: SyncError, dirty: bool) -> None:
        """Leave the engine as it was if no bucket was posted; otherwise dirty, paused and without an open session."""
        phase, touched = update.phase, _touched(update, error)
        logger.error("update %s broke off in phase %s: %s", update.id, phase.name.lower(), error.message)
        undone = await self._undo(update, resume=not touched and not dirty)
        restarted = isinstance(error, EngineRestarted) or self._engine.epoch != update.epoch
        if restarted or (undone and not touched):
            update.end(UpdateState.ABORTED, error)
        else:
            update.end(UpdateState.FAILED, _failed(update, phase, error))

    async def _undo(self, update: Update, *, resume: bool) -> bool:
        """End an open session; let generation go on if it may. Whether all that worked."""
        try:
            if update.phase in (Phase.BEGIN, Phase.LOAD):
                await self._engine.end_if_open()
            if resume:
                await self._engine.resume()
        except (EngineDown, EngineRestarted):
            return True  # nothing is left to undo: a server that comes back has fresh weights
        except EngineError as failure:
            logger.error("while undoing update %s: %s", update.id, failure.message)
            return False
        return True

    @asynccontextmanager
    async def _phase(self, update: Update, phase: Phase) -> AsyncIterator[None]:
        update.phase = phase
        self._changed()
        started = time.monotonic()
        try:
            yield
        finally:
            update.phase_seconds[phase] = time.monotonic() - started


def _touched(update: Update, error: SyncError) -> bool:
    """Whether weights may have been written: SGLang answers 400 to a bucket only before it writes any of it."""
    refused_the_first = update.num_posted == 1 and update.num_loaded == 0 and isinstance(error, EngineRefused)
    return update.num_posted > 0 and not refused_the_first


def _failed(update: Update, phase: Phase, error: SyncError) -> UpdateFailed:
    where = f"in phase {phase.name.lower()}"
    if phase is Phase.LOAD:
        where += f" at bucket {update.num_loaded} of {update.num_buckets}"
    message = f"update {update.id!r} broke off {where} after the engine was touched: {error.message}; generation stays "
    message += "paused until a complete update is loaded"
    details = {**error.details, "updateId": update.id, "phase": phase.name, "bucket": update.num_loaded}
    details |= {"numPosted": update.num_posted, "cause": error.reason}
    return UpdateFailed(Reason.UPDATE_FAILED, message, **details)
