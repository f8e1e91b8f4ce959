"""The sequence that loads a collected update into the engine, and what is done when it breaks off.

    pause -> begin -> one POST per bucket -> end -> (flush) -> (verify) -> (decide) -> publish -> resume    committed
      |        |                |             |        |           |           |          |         |
      |        +-- nothing posted yet: end, resume -> aborted      +-----------+----------+---------+-> failed, held
      +-- resume -> aborted

A disk update has one POST of another kind in the middle, and no session. Over a group the buckets are received instead
of opened, one POST each, and one that breaks off leaves the group at once. An answer that was lost is looked into
(``fate``) before it counts as a failure.

Invariants: publish comes last but for resume, so no answer carries a version that was not fully loaded; a POST that
writes weights is made once; after the first of them a failure leaves generation held, and so does any failure while
the engine is dirty from an update before.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Protocol

from sidecar import fate, group, refusals
from sidecar.engine.info import EngineInfo
from sidecar.errors import (
    EngineDown,
    EngineError,
    EngineLost,
    EngineRefused,
    EngineRestarted,
    EngineTimeout,
    EngineUnreachable,
    SyncError,
)
from sidecar.header import PauseMode, Selector
from sidecar.memory import is_kept
from sidecar.payload import LOAD_FORMAT, REPLAY_FORMAT, BucketPayload
from sidecar.replay import Replay
from sidecar.tracing import Spans
from sidecar.update import LoadPath, Phase, Update, UpdateState, Verification
from sidecar.verification import Verifier

logger = logging.getLogger(__name__)

NO_SUCH_ROUTE = ("404", "405")
"""What a server answers that does not have a route: nothing has been done."""

# With retract on 0.5.21 and later, and with abort, a flush works at once or after a step; with requests that wait
# on older releases it never does, and generation is paused meanwhile.
FLUSH_PATIENCE_S = 1.0
NOT_FLUSHED = "requests in flight kept the prefix cache from being flushed: later answers may rest on KV of old weights"


class Engine(fate.Engine, Protocol):
    """What applying needs of an engine; each call is bounded and raises ``EngineError``."""

    @property
    def epoch(self) -> int:
        """Counts its lives; 0 until it was seen."""

    @property
    def uses_sessions(self) -> bool:
        """Whether loading happens inside a session; known from ``pause`` on."""

    async def pause(self, mode: PauseMode, limit_s: float) -> None:
        """Hold generation."""

    async def hold(self) -> None:
        """See that generation is held."""

    async def begin(self, selector: Selector, limit_s: float) -> None:
        """Open a session, where the engine has them."""

    @property
    def info(self) -> EngineInfo | None:
        """What it said of itself, while it can be reached."""

    async def load(
        self, entries: Sequence[bytes], load_format: str, selector: Selector, weight_version: str | None
    ) -> None:
        """Load one bucket from one entry per TP rank."""

    async def receive(self, tensors: Mapping[str, object], group_name: str, selector: Selector) -> None:
        """Load one bucket that the group's rank 0 broadcasts."""

    async def load_from_disk(self, model_path: str) -> None:
        """Load a checkpoint."""

    async def end(self) -> None:
        """Close the session."""

    async def end_if_open(self) -> None:
        """Close the session if there is one."""

    async def flush(self, patience_s: float) -> bool:
        """Empty the prefix cache, or tell that requests are in the way."""

    async def checksums(self) -> list[dict[str, str]]:
        """By TP rank: each tensor's name and digest."""

    async def publish(self, weight_version: str) -> None:
        """Set the version that answers carry."""

    async def resume(self) -> None:
        """Let generation go on."""


class Trainer(Protocol):
    """The ranks of an update, as the applier waits for them; each wait is bounded and raises ``SyncError``."""

    async def bucket(self, update: Update, bucket: int) -> None:
        """Until every rank has delivered that bucket (or, past the last, committed)."""

    async def decision(self, update: Update) -> None:
        """Until every rank has said that the version is to be published."""


class Membership(Protocol):
    """The group that the engine is in."""

    async def leave(self) -> bool:
        """Close its connections."""


class Applier:
    """Loads one update after another."""

    def __init__(
        self,
        engine: Engine,
        trainer: Trainer,
        membership: Membership,
        about_to_write: Callable[[Update], None],
        changed: Callable[[], None],
        replay: Replay,
        spans: Spans,
    ) -> None:
        self._engine = engine
        self._trainer = trainer
        self._membership = membership
        self._about_to_write = about_to_write
        self._changed = changed
        self._replay = replay
        self._spans = spans
        self._verifier = Verifier()

    async def apply(self, update: Update, payloads: Sequence[BucketPayload], *, stay_held: bool) -> None:
        """Bring ``update`` from APPLYING to an ended state; raises nothing that the engine or a rank can cause.

        ``stay_held``: the engine must not generate if this breaks off, because it holds mixed weights from before or
        was taken out of service.
        """
        collected = update.started + update.phase_seconds.get(Phase.COLLECT, 0.0)
        with self._spans.update(update.trace, update.log_fields, update.started, collected) as tell:
            await self._load_and_publish(update, payloads, stay_held)
            tell(update.state.name.lower(), update.error.message if update.error else "")

    async def _load_and_publish(self, update: Update, payloads: Sequence[BucketPayload], stay_held: bool) -> None:
        try:
            await self._pause(update)
            if update.model_path is None:
                await self._load_all(update, payloads)
            else:
                await self._load_from_disk(update, update.model_path)
            await self._make_visible(update)
        except SyncError as error:
            await self._break_off(update, error, stay_held)
        else:
            update.end(UpdateState.COMMITTED)
        self._changed()

    # The sequence.

    async def _pause(self, update: Update) -> None:
        async with self._phase(update, Phase.PAUSE):
            if update.header.pause_mode is not PauseMode.NONE:
                update.held_since = time.monotonic()
            await self._engine.pause(update.header.pause_mode, _left(update))

    async def _load_all(self, update: Update, payloads: Sequence[BucketPayload]) -> None:
        async with self._phase(update, Phase.BEGIN):
            await self._begin(update)
            if not update.header.group_name:
                update.replays = self._replay.suits(update.header, self._engine.info, update.epoch)
            if update.replays:
                await self._replay.greet(update, lambda entries: self._post(update, entries, REPLAY_FORMAT))
        async with self._phase(update, Phase.LOAD):
            update.receiving = True
            self._changed()
            for bucket, payload in enumerate(payloads):
                await self._load(update, bucket, payload)
            await self._trainer.bucket(update, len(payloads))
        async with self._phase(update, Phase.END):
            await self._end(update)

    async def _begin(self, update: Update) -> None:
        try:
            await self._engine.begin(_selector(update), _left(update))
        except EngineLost as lost:
            if not await fate.session_is_open(self._engine, lost):
                raise
            update.notes.append("the answer to begin_weight_update was lost; the session is open")

    async def _load(self, update: Update, bucket: int, payload: BucketPayload) -> None:
        await self._trainer.bucket(update, bucket)
        if bucket == 0:
            self._about_to_write(update)
        update.num_posted = bucket + 1
        try:
            await self._load_by(update, bucket, payload)
        except EngineUnreachable:
            update.num_posted = bucket  # it never left: the memory was not seen
            raise
        except EngineLost as lost:
            update.touched = True
            if not await self._was_loaded(update, bucket, payload, lost):
                raise
            update.notes.append(f"the answer to the load of bucket {bucket} was lost; every rank had loaded it")
        update.touched = True
        update.num_loaded = bucket + 1
        self._changed()

    async def _load_by(self, update: Update, bucket: int, payload: BucketPayload) -> None:
        """Through the replay loader, or as SGLang always does it, from memory or over the group."""
        if update.header.group_name:
            await self._receive(update, bucket)
            return
        if update.replays:
            await self._replay.load(update, bucket, payload, lambda entries: self._post(update, entries, REPLAY_FORMAT))
            return
        memories = update.memories(bucket)
        if any(map(is_kept, memories)):
            raise refusals.kept_memory_unusable(update.header)
        await self._post(update, [payload.entry(memory) for memory in memories], LOAD_FORMAT)
        update.loaded_by(LoadPath.STOCK)

    async def _receive(self, update: Update, bucket: int) -> None:
        try:
            tensors = group.tensors_of(update.manifest.buckets[bucket])
            await self._engine.receive(tensors, update.header.group_name, _selector(update))
        except EngineRefused as refusal:
            one_model = update.header.selector not in (Selector.ALL, Selector.DRAFT)
            wrote_nothing = group.wrote_nothing(refusal.message, update.num_engine_ranks, one_model=one_model)
            update.touched |= update.num_loaded > 0 or not wrote_nothing
            raise
        update.loaded_by(LoadPath.STOCK)

    async def _was_loaded(self, update: Update, bucket: int, payload: BucketPayload, lost: EngineLost) -> bool:
        if not await fate.is_settled(self._engine, bucket, lost):
            return False
        if update.header.group_name:
            raise refusals.group_lost(update, lost)
        if update.replays:
            return self._replay.was_loaded(update, bucket, payload)
        loaded = await fate.was_loaded(self._engine, update, bucket, self._version_carried(update))
        update.loaded_by(LoadPath.STOCK)
        return loaded

    async def _post(self, update: Update, entries: Sequence[bytes], load_format: str) -> None:
        try:
            await self._engine.load(entries, load_format, _selector(update), self._version_carried(update))
        except EngineRefused:
            # SGLang answers 400 to a bucket only before it writes any of it, but for a draft model's part, which comes
            # after the target's; and what came before this bucket was written.
            update.touched |= update.num_loaded > 0 or update.header.selector in (Selector.ALL, Selector.DRAFT)
            raise

    async def _end(self, update: Update) -> None:
        try:
            await self._engine.end()
        except EngineLost as lost:
            if await fate.session_is_open(self._engine, lost):
                raise
            update.notes.append("the answer to end_weight_update was lost; the session is closed")

    async def _load_from_disk(self, update: Update, model_path: str) -> None:
        async with self._phase(update, Phase.LOAD):
            await self._engine.end_if_open()  # what an update that failed may have left
            self._about_to_write(update)
            update.touched = True
            try:
                await self._engine.load_from_disk(model_path)
            except EngineUnreachable:
                update.touched = False
                raise
            except EngineRefused as refusal:
                update.touched = refusal.details.get("httpStatus") not in NO_SUCH_ROUTE
                raise

    async def _make_visible(self, update: Update) -> None:
        if not update.header.keep_cache:
            await self._flush(update)
        if update.header.verify:
            async with self._phase(update, Phase.VERIFY):
                await self._verify(update)
        if update.header.two_phase:
            async with self._phase(update, Phase.DECIDE):
                await self._trainer.decision(update)
        if self._version_carried(update) is None:
            async with self._phase(update, Phase.PUBLISH):
                await self._engine.publish(update.header.weight_version)
        async with self._phase(update, Phase.RESUME):
            await self._resume(update)

    async def _resume(self, update: Update) -> None:
        await self._engine.resume()
        if update.held_since < inf:
            update.held_s = time.monotonic() - update.held_since

    async def _flush(self, update: Update) -> None:
        async with self._phase(update, Phase.FLUSH):
            update.cache_flushed = await self._engine.flush(FLUSH_PATIENCE_S)
        if not update.cache_flushed:
            update.notes.append(NOT_FLUSHED)

    async def _verify(self, update: Update) -> None:
        """Before publishing, while generation is still held: a version that is wrong is never served."""
        try:
            checksums = await self._engine.checksums()
        except EngineRefused as refusal:
            update.verification = Verification.UNAVAILABLE
            update.notes.append(f"not verified: {refusal.message}")
        else:
            update.verification = self._verifier.check(update, checksums)

    def _version_carried(self, update: Update) -> str | None:
        """The version, if it goes with the bucket instead of by a call of its own: where nothing was paused."""
        unpaused = update.header.pause_mode is PauseMode.NONE and not self._engine.uses_sessions
        return update.header.weight_version if unpaused else None

    # Breaking off.

    async def _break_off(self, update: Update, error: SyncError, stay_held: bool) -> None:
        """Leave the engine as it was if no weight was written; otherwise dirty, held and without an open session."""
        phase, touched = update.phase, update.touched
        logger.error(
            "update %s broke off in phase %s: %s",
            update.id,
            phase.name.lower(),
            error.message,
            extra=update.log_fields | {"phase": phase.name.lower(), "reason": str(error.reason)},
        )
        if update.header.group_name and phase is Phase.LOAD and update.num_posted:
            await self._membership.leave()  # first: members who wait for this one are let go
        undone = await self._undo(update, resume=not touched and not stay_held)
        restarted = isinstance(error, EngineRestarted | EngineDown) or self._engine.epoch != update.epoch
        if restarted or (undone and not touched):
            timed_out = isinstance(error, EngineTimeout) and not restarted
            update.end(UpdateState.ABORTED, refusals.phase_deadline(update, phase, error) if timed_out else error)
        else:
            update.end(UpdateState.FAILED, refusals.failed(update, phase, error))

    async def _undo(self, update: Update, *, resume: bool) -> bool:
        """End an open session; let generation go on if it may. Whether all that worked."""
        try:
            if update.phase in (Phase.BEGIN, Phase.LOAD):
                await self._engine.end_if_open()
            await (self._resume(update) if resume else self._engine.hold())
        except (EngineDown, EngineRestarted):
            return True  # nothing is left to undo: a server that comes back has fresh weights
        except EngineError as failure:
            fields = update.log_fields | {"phase": update.phase.name.lower(), "reason": str(failure.reason)}
            logger.error("while undoing update %s: %s", update.id, failure.message, extra=fields)
            return False
        return True

    @asynccontextmanager
    async def _phase(self, update: Update, phase: Phase) -> AsyncIterator[None]:
        update.phase, update.phase_since = phase, time.monotonic()
        self._changed()
        try:
            with self._spans.phase(phase.name.lower(), update.log_fields):
                yield
        finally:
            update.phase_seconds[phase] = time.monotonic() - update.phase_since


def _selector(update: Update) -> Selector:
    return update.header.selector or Selector.ALL


def _left(update: Update) -> float:
    """Until weights are touched, the engine is given no longer than the last caller will wait."""
    left = update.patience_until - time.monotonic()
    if left <= 0:
        raise refusals.nobody_waits(update)
    return left
