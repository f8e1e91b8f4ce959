"""Brings one LoRA adapter at a time into the engine, from every rank's memory, and takes adapters out.

Beside the coordinator, whose place of the one update in hand it claims meanwhile. Lives on the same event loop.
Nothing is paused and no weight version changes; the model's own weights are not touched, so what the engine holds of
them stands whatever happens here. Invariants:

1. Nothing is posted until every rank has delivered the same checked adapter, and the load itself is posted once.
2. A load is carried out by a task of its own: a caller that goes takes back only memory that was not posted yet.
3. Every wait is bounded; an unload that outlasts its time is awaited again before the next load, which SGLang would
   otherwise keep waiting behind it, with the memory still unread.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Protocol

from sidecar import admission, fate, lora, lora_unloads, refusals
from sidecar.callers import WHOLE_UPDATE
from sidecar.config import Timeouts
from sidecar.engine.info import EngineInfo
from sidecar.errors import (
    EngineDown,
    EngineError,
    EngineLost,
    EngineRestarted,
    EngineUnreachable,
    SyncError,
    UpdateConflict,
)
from sidecar.header import Header
from sidecar.history import UpdateHistory
from sidecar.lora import AdapterSpec
from sidecar.lora_unloads import LoraUnloads
from sidecar.manifest import Manifest
from sidecar.manifest_store import KnownManifest
from sidecar.memory import Memory
from sidecar.references import References
from sidecar.update import Phase, Update, UpdateState
from sidecar.waiting import Waiting

logger = logging.getLogger(__name__)


class Engine(lora_unloads.Engine, Protocol):
    """What adapters need of an engine; each call is bounded and raises ``EngineError``."""

    @property
    def url(self) -> str:
        """Where it listens."""

    def attach(self) -> None:
        """Aim the next calls at the server that answers now."""

    async def settle(self, lost: EngineLost) -> None:
        """Return once the scheduler has dealt with what was posted before."""

    async def loaded_adapters(self) -> tuple[str, ...]:
        """Names that requests can use."""

    async def load_adapter(self, spec: AdapterSpec, entries: Sequence[bytes]) -> None:
        """Load one adapter from one entry per TP rank."""


class Turn(Protocol):
    """The coordinator, to whom the one place of what is in hand belongs."""

    references: References
    """What is known of the model."""

    async def engine_info(self) -> EngineInfo:
        """The engine, once it can be given something."""

    def claim(self, by: str) -> None:
        """Take the place; raises ``UpdateConflict``."""

    def release(self) -> None:
        """Give it back."""


class LoraLoader:
    """One sidecar's; see the module."""

    def __init__(self, engine: Engine, timeouts: Timeouts, turn: Turn) -> None:
        self._engine = engine
        self._timeouts = timeouts
        self._turn = turn
        self._loads = UpdateHistory()
        self._specs: dict[str, AdapterSpec] = {}
        """Of the load in hand, by its id."""
        self._tasks: dict[str, asyncio.Task[bool]] = {}
        """Of what is in hand, by what it is."""
        self._waiting = Waiting(gone=self._gone, late=self._deadline)
        self._unloads = LoraUnloads(engine, timeouts.pause)

    # What callers ask for.

    def find(self, update_id: str) -> Update:
        """One of the last loads by id; raises ``NotKnown``."""
        return self._loads.find(update_id)

    async def load(
        self, header: Header, spec: AdapterSpec, known: KnownManifest, memory: Memory, budget_s: float
    ) -> Update:
        """One rank's part of one load; returns the load once requests can name the adapter, or raises why not."""
        info = await self._checked_engine(header)
        epoch = self._engine.epoch
        notes = await self._check(info, spec, known, header.rank)
        if self._engine.epoch != epoch:
            raise refusals.restarted_meanwhile(header.update_id)
        load = self._again(header, memory)
        if load is None:
            admission.check_handles({0: memory}, known.manifest, header.rank, info.placement)
            load = self._find_or_start(header, spec, known, info, notes)
        if not load.state.ended:
            self._agree(load, header, spec, known)
            admission.check_own_memory({0: memory}, header.rank, load.deliveries)
            load.join(header.rank)
            load.deliver(header.rank, 0, memory)
            self._waiting.look_again()
        return await self._until_ended(load, header.rank, budget_s)

    async def give_up(self, header: Header, why: str) -> Update:
        """One rank gives a load up for all of them, those that come later included."""
        info = await self._checked_engine(header)
        load = self._loads.get(header.update_id)
        if load is None or load.state.ended:
            load = self._new_load(header, KnownManifest(Manifest(()), "", ()), info)
            load.join(header.rank)
            self._loads.add(load)
            self._end(load, refusals.aborted_by(load, header.rank, why))
        elif load.num_posted == 0:
            load.check_owner(header.rank)
            self._abort(load, refusals.aborted_by(load, header.rank, why))
            await self._waiting.until(lambda: load.state.ended)
        return load

    async def unload(self, name: str, budget_s: float) -> bool:
        """Take one adapter out; whether it was there. Several callers may ask for the same."""
        lora.check_name(name, "the caller")
        await self._checked_engine()
        what = f"the unloading of LoRA adapter {name!r}"
        task = self._tasks.get(what) or self._begin(what, lambda: self._unload_alone(name))
        done, _ = await asyncio.wait([task], timeout=budget_s)
        if not done:
            raise refusals.still_unloading(name)
        return bool(task.result())

    async def loaded(self) -> tuple[str, ...]:
        """What requests can name now; nothing where the engine does not say."""
        try:
            return await self._engine.loaded_adapters()
        except EngineError:
            return ()

    async def drain(self, seconds: float) -> None:
        """Give up what is only being collected, and let the rest end."""
        tasks = list(self._tasks.values())
        for load in self._loads_in_hand():
            if load.state is UpdateState.COLLECTING:
                self._abort(load, refusals.draining())
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    # Joining a load.

    async def _checked_engine(self, header: Header | None = None) -> EngineInfo:
        info = await self._turn.engine_info()
        if not info.serves_lora:
            raise refusals.lora_not_served(self._engine.url)
        if header is not None:
            header.check(info.tp_size)
        if info.tp_size > 1 and not info.lora_by_rank:
            raise refusals.lora_one_rank_only(info.version, info.tp_size)
        return info

    async def _check(self, info: EngineInfo, spec: AdapterSpec, known: KnownManifest, rank: int) -> list[str]:
        """Everything about the adapter that can be told without the engine; what could not, in sentences."""
        lora.check_tensors(spec, known.manifest, rank)
        tensors, problem = await self._turn.references.tensors(info.model_path)
        notes = lora.check_model(known.manifest, tensors, rank) if tensors else []
        return [*notes, f"shapes not checked against the checkpoint: {problem}"] if problem else notes

    def _again(self, header: Header, memory: Memory) -> Update | None:
        """The load that this very call was made for before, with the same memory, unless it came to nothing."""
        load = self._loads.get(header.update_id)
        if load is None or load.state is UpdateState.ABORTED or load.epoch != self._engine.epoch:
            return None
        before = load.deliveries.get(header.rank)
        return load if before is not None and before.handles == {0: memory} else None

    def _find_or_start(
        self, header: Header, spec: AdapterSpec, known: KnownManifest, info: EngineInfo, notes: list[str]
    ) -> Update:
        existing = self._loads.get(header.update_id)
        if existing and not existing.state.ended:
            return existing
        if existing and existing.error and existing.concerns(header.rank, time.monotonic()):
            existing.told.add(header.rank)
            raise existing.error
        load = self._new_load(header, known, info)
        self._begin(f"LoRA adapter {spec.name!r}", lambda: self._run(load, spec, known))
        load.notes.extend(notes)
        self._specs[load.id] = spec
        self._loads.add(load)
        return load

    def _new_load(self, header: Header, known: KnownManifest, info: EngineInfo) -> Update:
        now = time.monotonic()
        return Update(header, known.manifest, known.digest, info.placement, self._engine.epoch, started=now)

    def _agree(self, load: Update, header: Header, spec: AdapterSpec, known: KnownManifest) -> None:
        """Ranks must send the same; a difference gives the load up for all of them."""
        try:
            load.check_same(header, known.manifest, known.digest)
            if spec != self._specs[load.id]:
                raise refusals.adapters_differ(load, header.rank)
        except UpdateConflict as difference:
            if load.state is UpdateState.COLLECTING:
                self._abort(load, difference)
            raise

    # What is in hand.

    def _begin(self, what: str, work: Callable[[], Coroutine[None, None, bool]]) -> asyncio.Task[bool]:
        self._turn.claim(what)
        task = asyncio.create_task(work(), name=what)
        self._tasks[what] = task
        task.add_done_callback(lambda _: self._done(what))
        return task

    def _done(self, what: str) -> None:
        task = self._tasks.pop(what)
        self._turn.release()
        if not task.cancelled() and (error := task.exception()):  # callers may have gone: it must not vanish
            logger.error("%s: %s", what, error)

    def _loads_in_hand(self) -> list[Update]:
        return [load for name in self._specs if (load := self._loads.get(name)) and not load.state.ended]

    async def _run(self, load: Update, spec: AdapterSpec, known: KnownManifest) -> bool:
        try:
            await self._collect(load)
            await self._apply(load, spec, known)
        except SyncError as error:
            self._end(load, error)
        except Exception as bug:  # the edge of a task that nobody awaits: it must not vanish
            logger.exception("LoRA load %s: a defect in the sidecar", load.id)
            self._end(load, refusals.defect(load, bug))
        else:
            self._end(load, None)
        return load.error is None

    async def _collect(self, load: Update) -> None:
        seconds = self._timeouts.collect
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.until(lambda: load.abort_request is not None or not load.waiting_for(0))
        except TimeoutError:
            raise refusals.missing(load, load.missing(), "to arrive", seconds) from None
        self._check_wanted(load, unloaded=False)
        load.phase_seconds[Phase.COLLECT] = time.monotonic() - load.started
        load.start_applying()

    async def _apply(self, load: Update, spec: AdapterSpec, known: KnownManifest) -> None:
        load.phase, load.phase_since = Phase.LOAD, time.monotonic()
        started = load.phase_since
        self._engine.attach()
        await self._unloads.finish()
        unloaded = await self._make_room(spec)
        self._check_wanted(load, unloaded=unloaded)
        for rank, memory in enumerate(load.memories(0)):  # delivered a while ago: one that has gone kills the engine
            admission.check_handles({0: memory}, known.manifest, rank, load.placement)
        try:
            await self._post(load, spec, [known.payloads[0].entry(memory) for memory in load.memories(0)])
        except (EngineRestarted, EngineDown):
            raise
        except EngineError as error:
            raise refusals.lora_load_broke(load, error, await self._names(), unloaded=unloaded) from error
        load.phase_seconds[Phase.LOAD] = time.monotonic() - started

    async def _make_room(self, spec: AdapterSpec) -> bool:
        """See that the name is free; whether something was unloaded for that."""
        loaded = await self._engine.loaded_adapters()
        if spec.name not in loaded:
            return False
        if not spec.replace:
            raise refusals.lora_name_taken(spec.name, loaded)
        return await self._unloads.unload(spec.name)

    async def _post(self, load: Update, spec: AdapterSpec, entries: list[bytes]) -> None:
        load.num_posted = 1
        try:
            await self._engine.load_adapter(spec, entries)
        except EngineUnreachable:
            load.num_posted = 0  # it never left
            raise
        except EngineLost as lost:
            if not await self._was_loaded(load, spec.name, lost):
                raise
            load.notes.append("the answer to the load was lost; the engine lists the adapter")

    async def _was_loaded(self, load: Update, name: str, lost: EngineLost) -> bool:
        """Whether requests can name it, once the scheduler has dealt with a load whose answer was ``lost``."""
        try:
            await self._engine.settle(lost)
        except (EngineDown, EngineRestarted) as gone:
            raise refusals.died_of(lost) from gone
        except EngineError as failure:
            logger.warning("the engine has not dealt with adapter %s: %s", name, failure.message)
            return False
        if self._engine.epoch != load.epoch:
            raise refusals.died_of(lost)
        for _ in range(fate.LOOKS):
            if name in await self.loaded():
                return True
            await asyncio.sleep(fate.LOOK_S)
        return False

    async def _names(self) -> tuple[str, ...] | None:
        try:
            return await self._engine.loaded_adapters()
        except EngineError:
            return None

    # Unloading.

    async def _unload_alone(self, name: str) -> bool:
        self._engine.attach()
        return await self._unloads.unload(name)

    # Waiting, and ends.

    def _check_wanted(self, load: Update, *, unloaded: bool) -> None:
        if load.abort_request:
            raise refusals.lora_unwanted(load, load.abort_request) if unloaded else load.abort_request
        if load.epoch != self._engine.epoch:
            raise refusals.restarted_meanwhile(load.id)

    def _end(self, load: Update, error: SyncError | None) -> None:
        if error:
            error.details["numPosted"] = str(load.num_posted)
        load.end(UpdateState.ABORTED if error else UpdateState.COMMITTED, error)
        load.ended_at = time.monotonic()
        self._specs.pop(load.id, None)
        said = f": {error.message}" if error else ""
        logger.info("LoRA adapter %s (%s): %s%s", load.header.weight_version, load.id, load.state.name.lower(), said)
        self._waiting.look_again()

    def _abort(self, load: Update, error: SyncError) -> None:
        load.abort_request = load.abort_request or error
        self._waiting.look_again()

    async def _until_ended(self, load: Update, rank: int, budget_s: float) -> Update:
        """A rank's own wait: while ranks are missing, its end is the load's."""
        ended = self._waiting.until(lambda: load.state.ended)
        await self._waiting.call(load, rank, WHOLE_UPDATE, ended, budget_s)
        await self._waiting.until(lambda: load.state.ended)  # that of a load that was given up follows
        if load.error:
            raise load.error
        return load

    def _deadline(self, load: Update, seconds: float) -> None:
        if load.state is UpdateState.COLLECTING:
            self._abort(load, refusals.missing(load, load.missing(), "to arrive", seconds))

    def _gone(self, load: Update, rank: int, _: int) -> None:
        """Memory that was not posted yet must not be posted any more: it may be gone with its owner."""
        if not load.state.ended and load.num_posted == 0:
            self._abort(load, refusals.caller_gone(load, rank))
