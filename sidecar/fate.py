"""What became of a call whose answer was lost: asked of the engine and read from the memory that was handed over.

Invariant: nothing here touches weights, and nothing is sent a second time. "Cannot tell" is the lost call's own error.
"""

import asyncio
import logging
from typing import Protocol

from sidecar import memory
from sidecar.errors import EngineDown, EngineError, EngineLost, EngineRestarted, Reason
from sidecar.update import Update

logger = logging.getLogger(__name__)

LOOKS, LOOK_S = 8, 0.25


class Engine(Protocol):
    """What can be asked."""

    async def settle(self, lost: EngineLost) -> None:
        """Return once the engine has dealt with the load whose answer was lost."""

    async def session_is_open(self) -> bool:
        """Whether a session is open."""

    async def serves(self, weight_version: str) -> bool:
        """Whether answers carry that version."""

    async def abort_requests(self) -> None:
        """End every request in flight."""


async def session_is_open(engine: Engine, lost: EngineLost) -> bool:
    """Whether a begin or an end, whose answer was ``lost``, has left the session open; raises ``lost`` if unknown."""
    try:
        return await engine.session_is_open()
    except EngineRestarted:
        raise
    except EngineDown as down:
        raise _died(lost) from down
    except EngineError as failure:
        logger.warning("the session cannot be asked for: %s", failure.message)
        raise lost from failure


async def is_settled(engine: Engine, bucket: int, lost: EngineLost) -> bool:
    """Whether the engine has dealt with a bucket whose answer was ``lost``, one way or the other."""
    try:
        await engine.settle(lost)
    except EngineDown as down:
        raise _died(lost) from down
    except EngineError as failure:
        logger.warning("the engine has not dealt with bucket %d: %s", bucket, failure.message)
        return False
    return True


async def was_loaded(engine: Engine, update: Update, bucket: int, weight_version: str | None) -> bool:
    """Whether a bucket that the engine has dealt with is loaded on every rank.

    An exception while loading kills the server, and a refusal leaves the memory unopened. So a server that lives, and
    has let go of every rank's memory, has loaded all of it; of memory on another host that cannot be told from here.
    Where the bucket carried its version, that tells instead.
    """
    if weight_version is not None:
        return await _is_served(engine, update, weight_version)
    return _was_let_go(update, bucket)


def _was_let_go(update: Update, bucket: int) -> bool:
    """Whether every rank's memory was, as far as this host shows it; what it does not show is noted, if it matters."""
    handles = dict(enumerate(update.memories(bucket)))
    hidden = [r for r, handle in handles.items() if not (update.placement.is_here(r) or memory.is_seen(handle))]
    held = [rank for rank, handle in handles.items() if rank not in hidden and not memory.let_go(handle)]
    if hidden and not held:
        note = f"the answer to the load of bucket {bucket} was lost; whether ranks {hidden} have loaded it cannot be "
        update.notes.append(note + "told, since their memory is on another host")
    return not held and not hidden


async def _is_served(engine: Engine, update: Update, weight_version: str) -> bool:
    """Whether a bucket that carried its version has been loaded, once it can no longer be loaded later.

    Unpaused, SGLang lets it wait for requests in flight without limit, and then it would overwrite the next update. So
    it is let through, at the cost of those requests.
    """
    if await _comes_to_serve(engine, weight_version):
        return True
    await engine.abort_requests()
    update.notes.append("requests in flight were ended, since the bucket waited for them for too long")
    return await _comes_to_serve(engine, weight_version)


async def _comes_to_serve(engine: Engine, weight_version: str) -> bool:
    for _ in range(LOOKS):
        if await engine.serves(weight_version):
            return True
        await asyncio.sleep(LOOK_S)
    return False


def _died(lost: EngineLost) -> EngineRestarted:
    """Nobody listens any more: nothing is left to be dirty."""
    return EngineRestarted(Reason.ENGINE_LOST, f"{lost.message}; it has died since", **lost.details)
