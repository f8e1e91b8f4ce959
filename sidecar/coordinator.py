"""Collects every rank's part of an update, has it applied once, and remembers how it went.

The only writer of updates. Lives on one event loop, so nothing here is locked. Invariants:

1. The engine is untouched until every rank has delivered the same checked manifest and its first bucket.
2. One update is in hand at a time, and it is applied by a task of the coordinator's own: callers only wait for it,
   so one that cancels, times out or dies after applying began changes nothing.
3. Every wait is bounded, by the caller's deadline or a setting, and says for which ranks or bucket it was.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Protocol

from sidecar import admission
from sidecar.applier import Applier, Engine
from sidecar.config import Timeouts
from sidecar.engine.info import EngineInfo
from sidecar.errors import (
    DeadlinePassed,
    Draining,
    InvalidRequest,
    NotKnown,
    RankAlreadyDelivered,
    Reason,
    SyncError,
    UnsuitableEngine,
    UpdateConflict,
    UpdateFailed,
)
from sidecar.manifest_store import KnownManifest
from sidecar.memory import Memory
from sidecar.update import Header, Phase, Update, UpdateState

logger = logging.getLogger(__name__)

KEPT_UPDATES = 64


class SidecarState(IntEnum):
    """The sidecar in one word; the numbers are the protocol's."""

    ENGINE_UNREACHABLE = 1
    READY = 2
    COLLECTING = 3
    APPLYING = 4
    DIRTY = 5
    DRAINING = 6


class WatchedEngine(Engine, Protocol):
    """An engine, and what the watch knows of it."""

    @property
    def url(self) -> str:
        """Where it listens."""

    @property
    def info(self) -> EngineInfo | None:
        """What it last said about itself; None while it cannot be reached."""

    @property
    def weight_version(self) -> str:
        """What its answers carry."""

    async def probe(self) -> EngineInfo:
        """Ask it now; raises ``EngineError``."""


class Coordinator:
    """The sidecar's mind; see the module."""

    def __init__(
        self,
        engine: WatchedEngine,
        timeouts: Timeouts,
        on_change: Callable[[], None] = lambda: None,
        on_ended: Callable[[Update], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._timeouts = timeouts
        self._on_change = on_change
        self._on_ended = on_ended
        self._applier = Applier(engine, self._wait_for_bucket, self.changed)
        self._updates: OrderedDict[str, Update] = OrderedDict()
        self._current: Update | None = None
        self._manifest: KnownManifest | None = None
        self._callers: Counter[tuple[str, int, int]] = Counter()
        self._change = asyncio.Event()
        self._applying: asyncio.Task[None] | None = None
        self._collect_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._dirty: SyncError | None = None

    # What anyone may ask.

    @property
    def state(self) -> SidecarState:
        """In one word."""
        if self._draining:
            return SidecarState.DRAINING
        if self._current and self._current.state is UpdateState.APPLYING:
            return SidecarState.APPLYING
        if self._engine.info is None:
            return SidecarState.ENGINE_UNREACHABLE
        if self._dirty:
            return SidecarState.DIRTY
        return SidecarState.COLLECTING if self._current else SidecarState.READY

    @property
    def reason(self) -> str:
        """Why updates or answers are held up, where they are."""
        if self._dirty:
            return self._dirty.message
        if self._engine.info is None:
            return f"the engine at {self._engine.url} does not answer"
        return self._engine.info.unsupported

    @property
    def ready(self) -> bool:
        """Whether the engine serves the weights of one version, and updates are welcome."""
        info = self._engine.info
        return not self._draining and self._dirty is None and info is not None and not info.unsupported

    @property
    def weight_version(self) -> str:
        """What the engine serves; empty while that is no one version."""
        return "" if self._dirty else self._engine.weight_version

    @property
    def engine(self) -> EngineInfo | None:
        """The engine, while it can be reached."""
        return self._engine.info

    @property
    def current(self) -> Update | None:
        """The update in hand."""
        return self._current

    @property
    def last(self) -> Update | None:
        """The newest update that ended."""
        return next((update for update in reversed(self._updates.values()) if update.state.ended), None)

    def find(self, update_id: str) -> Update:
        """One of the last updates by id; raises ``NotKnown``."""
        found = self._updates.get(update_id)
        if found is None:
            message = f"update {update_id!r} is not among the last {KEPT_UPDATES}; was the sidecar restarted since?"
            raise NotKnown(Reason.UPDATE_UNKNOWN, message, updateId=update_id)
        return found

    # What a rank does.

    async def update_weights(
        self, header: Header, known: KnownManifest, handles: Mapping[int, Memory], budget_s: float
    ) -> Update:
        """One rank's whole part; returns the committed update or raises why there is none."""
        admission.check_every_bucket_has_memory(handles, known.manifest, header.rank)
        update = await self._join(header, known, handles)
        if update.state.ended:
            self._check_repeated(update, header.rank, handles)
        else:
            for bucket, memory in handles.items():
                update.deliver(header.rank, bucket, memory)
            update.deliveries[header.rank].committed = True
            self._delivered(update)
        return await self._until_ended(update, header.rank, budget_s)

    async def begin(self, header: Header, known: KnownManifest) -> Update:
        """One rank announces its part, whose buckets follow."""
        update = await self._join(header, known, {})
        if update.error:
            raise update.error
        return update

    async def push(self, update_id: str, rank: int, bucket: int, memory: Memory, budget_s: float) -> None:
        """One rank's memory for one bucket; returns when the engine has loaded it."""
        update = self._joined(update_id, rank)
        if not 0 <= bucket < update.num_buckets:
            message = f"rank {rank}: bucket {bucket} is outside 0..{update.num_buckets - 1} of update {update_id!r}"
            raise InvalidRequest(Reason.INVALID_HANDLE, message, rank=rank, bucket=bucket)
        if not update.state.ended:
            self._admit(update, rank, {bucket: memory}, await self._engine_info())
            update.deliver(rank, bucket, memory)
            self._delivered(update)
        await self._until_loaded(update, rank, bucket, budget_s)

    async def commit(self, update_id: str, rank: int, budget_s: float) -> Update:
        """One rank has pushed everything; returns the committed update or raises why there is none."""
        update = self._joined(update_id, rank)
        unpushed = [bucket for bucket in range(update.num_buckets) if rank in update.waiting_for(bucket)]
        if unpushed and not update.state.ended:
            message = f"rank {rank} commits update {update_id!r} without having pushed buckets {unpushed}"
            raise InvalidRequest(Reason.EMPTY_UPDATE, message, rank=rank, updateId=update_id)
        update.deliveries[rank].committed = True
        self.changed()
        return await self._until_ended(update, rank, budget_s)

    async def abort(self, update_id: str, rank: int, why: str) -> Update:
        """One rank gives the update up for all; raises if nothing can stop it any more."""
        update = self._joined(update_id, rank)
        message = f"rank {rank} aborted update {update_id!r}: {why or 'no reason given'}"
        error = UpdateConflict(Reason.UPDATE_ABORTED, message, rank=rank, updateId=update_id)
        if update.state is UpdateState.COLLECTING:
            self._give_up(update, error)
        elif update.state is UpdateState.APPLYING:
            if update.complete:
                message = f"update {update_id!r} is complete and being applied; ask for its outcome instead"
                raise UnsuitableEngine(Reason.NOT_ABORTABLE, message, updateId=update_id)
            update.abort_request = error
            self.changed()
            await self._until(lambda: update.state.ended)
        return update

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, give up what is only being collected, and let an update that is applied end."""
        self._draining = True
        if self._current and self._current.state is UpdateState.COLLECTING:
            self._give_up(
                self._current, Draining(Reason.DRAINING, "the sidecar is stopping; the engine was not touched")
            )
        self.changed()
        if self._applying is None:
            return True
        done, _ = await asyncio.wait([self._applying], timeout=seconds)
        return bool(done)

    # Joining an update.

    async def _join(self, header: Header, known: KnownManifest, handles: Mapping[int, Memory]) -> Update:
        """Check everything that can be checked, and only then take the rank into its update."""
        info = await self._engine_info()
        header.check(info.tp_size)
        admission.check_handles(handles, known.manifest, header.rank, info)
        update = self._find_or_start(header, known)
        self._agree(update, header, known)
        if not update.state.ended:
            admission.check_own_gpu(handles, header.rank, update.deliveries)
            update.join(header.rank)
            self.changed()
        return update

    async def _engine_info(self) -> EngineInfo:
        if self._draining:
            raise Draining(Reason.DRAINING, "the sidecar is stopping and takes no new update; try its successor")
        info = self._engine.info or await self._engine.probe()
        if info.unsupported:
            message = f"the engine at {self._engine.url} cannot be updated: {info.unsupported}"
            raise UnsuitableEngine(Reason.ENGINE_UNSUPPORTED, message, engineUrl=self._engine.url)
        return info

    def _find_or_start(self, header: Header, known: KnownManifest) -> Update:
        existing = self._updates.get(header.update_id)
        if existing and existing.state is not UpdateState.ABORTED:
            return existing
        if self._current:
            raise self._in_progress(self._current, header)
        update = Update(header=header, manifest=known.manifest, digest=known.digest, started=time.monotonic())
        self._start(update, known)
        return update

    def _start(self, update: Update, known: KnownManifest) -> None:
        self._current, self._manifest = update, known
        self._updates.pop(update.id, None)
        self._updates[update.id] = update
        while len(self._updates) > KEPT_UPDATES:
            self._updates.popitem(last=False)
        timer = asyncio.get_running_loop().call_later
        self._collect_timer = timer(self._timeouts.collect, self._collect_deadline, update, self._timeouts.collect)

    def _in_progress(self, current: Update, header: Header) -> UpdateConflict:
        message = f"rank {header.rank} sends update {header.update_id!r}, but update {current.id!r} is "
        message += (
            f"{current.state.name.lower()} and waits for ranks {current.missing()}; every rank must send the same"
        )
        return UpdateConflict(
            Reason.UPDATE_IN_PROGRESS, message, rank=header.rank, updateId=header.update_id, current=current.id
        )

    def _agree(self, update: Update, header: Header, known: KnownManifest) -> None:
        """Ranks must send the same: a difference while collecting gives the update up for all of them."""
        try:
            update.check_same(header, known.manifest, known.digest)
        except UpdateConflict as difference:
            if update.state.ended:
                message = f"update id {update.id!r} was used before with other content; choose a new one"
                raise RankAlreadyDelivered(Reason.UPDATE_ID_REUSED, message, updateId=update.id) from difference
            if update.state is UpdateState.COLLECTING:
                self._give_up(update, difference)
            raise

    @staticmethod
    def _check_repeated(update: Update, rank: int, handles: Mapping[int, Memory]) -> None:
        """Only the very call that was made before gets its answer again: other memory means other weights."""
        before = update.deliveries.get(rank)
        if before is None or before.handles != handles:
            message = f"update id {update.id!r} has ended ({update.state.name.lower()}) and these weights, from rank "
            message += f"{rank}, were not loaded; choose a new update id (and version)"
            raise RankAlreadyDelivered(Reason.UPDATE_ID_REUSED, message, updateId=update.id, rank=rank)

    def _joined(self, update_id: str, rank: int) -> Update:
        update = self.find(update_id)
        if rank not in update.deliveries:
            message = f"rank {rank} has not begun update {update_id!r}; call BeginUpdate first"
            raise InvalidRequest(Reason.RANK_OUT_OF_RANGE, message, rank=rank, updateId=update_id)
        return update

    @staticmethod
    def _admit(update: Update, rank: int, handles: Mapping[int, Memory], info: EngineInfo) -> None:
        admission.check_handles(handles, update.manifest, rank, info)
        admission.check_own_gpu(handles, rank, update.deliveries)

    # From collecting to an end.

    def _delivered(self, update: Update) -> None:
        """A rank delivered something: start applying once every rank has brought its first bucket."""
        if update.state is UpdateState.COLLECTING and not update.waiting_for(0):
            update.phase_seconds[Phase.COLLECT] = time.monotonic() - update.started
            update.start_applying()
            self._stop_collect_timer()
            self._applying = asyncio.create_task(self._apply(update), name=f"apply {update.id}")
        self.changed()

    async def _apply(self, update: Update) -> None:
        assert self._manifest is not None
        try:
            await self._applier.apply(update, self._manifest.payloads)
        except Exception as bug:  # the edge of a task that nobody awaits: it must not vanish
            logger.exception("update %s: a defect in the sidecar", update.id)
            message = f"update {update.id!r} broke off by a defect in the sidecar ({type(bug).__name__}); see its log"
            update.end(UpdateState.FAILED, UpdateFailed(Reason.UPDATE_FAILED, message, updateId=update.id))
        self._ended(update)

    def _give_up(self, update: Update, error: SyncError) -> None:
        """COLLECTING -> ABORTED."""
        update.end(UpdateState.ABORTED, error)
        self._stop_collect_timer()
        self._ended(update)

    def _ended(self, update: Update) -> None:
        self._current = self._manifest = self._applying = None
        if update.state is UpdateState.COMMITTED:
            self._dirty = None
        elif update.state is UpdateState.FAILED:
            self._dirty = update.error
        logger.info(
            "update %s (version %s): %s%s",
            update.id,
            update.header.weight_version,
            update.state.name.lower(),
            f": {update.error.message}" if update.error else "",
        )
        self._on_ended(update)
        self.changed()

    def _stop_collect_timer(self) -> None:
        if self._collect_timer:
            self._collect_timer.cancel()
            self._collect_timer = None

    # Waiting.

    def changed(self) -> None:
        """Wake everyone who waits, to look again."""
        self._change.set()
        self._change = asyncio.Event()
        self._on_change()

    async def _until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            await self._change.wait()

    async def _until_ended(self, update: Update, rank: int, budget_s: float) -> Update:
        with self._calling(update, rank, bucket=None):
            try:
                async with asyncio.timeout(budget_s):
                    await self._until(lambda: update.state.ended)
            except TimeoutError:
                self._caller_deadline(update, budget_s)
        if update.error:
            raise update.error
        return update

    async def _until_loaded(self, update: Update, rank: int, bucket: int, budget_s: float) -> None:
        with self._calling(update, rank, bucket):
            try:
                async with asyncio.timeout(budget_s):
                    await self._until(lambda: update.num_loaded > bucket or update.state.ended)
            except TimeoutError:
                self._caller_deadline(update, budget_s)
        if update.num_loaded <= bucket and update.error:
            raise update.error

    async def _wait_for_bucket(self, update: Update, bucket: int) -> None:
        """For the applier: until every rank has delivered ``bucket`` (committed, past the last), or will not."""
        missing = update.uncommitted if bucket == update.num_buckets else lambda: update.waiting_for(bucket)
        seconds = self._timeouts.bucket
        try:
            async with asyncio.timeout(seconds):
                await self._until(lambda: update.abort_request is not None or not missing())
        except TimeoutError:
            what = "to commit" if bucket == update.num_buckets else f"to deliver bucket {bucket}"
            raise self._missing(update, missing(), what, seconds) from None
        if update.abort_request:
            raise update.abort_request

    def _caller_deadline(self, update: Update, seconds: float) -> None:
        """A caller's time is over: a collecting update is given up for all, an applied one goes on."""
        if update.state is UpdateState.COLLECTING:
            self._collect_deadline(update, seconds)
        elif update.state is UpdateState.APPLYING:
            message = f"update {update.id!r} is still being applied (phase {update.phase.name.lower()}, bucket "
            message += f"{update.num_loaded} of {update.num_buckets}); it goes on: ask for its outcome with GetUpdate"
            raise DeadlinePassed(Reason.STILL_APPLYING, message, updateId=update.id, phase=update.phase.name)

    def _collect_deadline(self, update: Update, seconds: float) -> None:
        if update.state is UpdateState.COLLECTING:
            what = "to arrive" if update.num_buckets == 1 else "to arrive with their first bucket"
            self._give_up(update, self._missing(update, update.missing(), what, seconds))

    @staticmethod
    def _missing(update: Update, ranks: list[int], what: str, seconds: float) -> DeadlinePassed:
        names = ", ".join(map(str, ranks))
        message = f"update {update.id!r}: waited {seconds:.1f} s for rank{'s' if len(ranks) > 1 else ''} {names} {what}"
        if update.num_posted == 0:
            message += "; the engine was not touched and serves the old weights"
        return DeadlinePassed(Reason.RANKS_MISSING, message, updateId=update.id, ranks=names)

    @contextmanager
    def _calling(self, update: Update, rank: int, bucket: int | None) -> Iterator[None]:
        """Count a rank's calls: when the last one goes before its memory was used, the memory goes with it."""
        key = (update.id, rank, -1 if bucket is None else bucket)
        self._callers[key] += 1
        try:
            yield
        except asyncio.CancelledError:
            if self._callers[key] == 1:
                self._caller_gone(update, rank, bucket)
            raise
        finally:
            self._callers[key] -= 1
            if not self._callers[key]:
                del self._callers[key]

    def _caller_gone(self, update: Update, rank: int, bucket: int | None) -> None:
        if update.state is UpdateState.COLLECTING:
            message = f"update {update.id!r}: rank {rank} cancelled its call, or died, before all ranks had delivered; "
            message += "the engine was not touched"
            self._give_up(update, UpdateConflict(Reason.UPDATE_ABORTED, message, updateId=update.id, rank=rank))
        elif bucket is not None and update.state is UpdateState.APPLYING and bucket >= update.num_posted:
            update.withdraw(rank, bucket)
