"""The coordinator under random schedules: ranks that arrive, cancel and time out, an engine that fails at any step.

The engine here keeps SGLang's rules and raises if the coordinator breaks one; the invariants of the architecture are
asserted after every schedule. `WEIGHT_SYNC_SCHEDULES` sets how many schedules are tried.
"""

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.config import Timeouts
from sidecar.coordinator import Coordinator, SidecarState
from sidecar.engine.info import EngineInfo, parse
from sidecar.errors import EngineLost, EngineRefused, EngineUnreachable, Reason, SyncError
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.manifest_store import KnownManifest, ManifestStore
from sidecar.memory import Memory, SharedMemory
from sidecar.update import Header, PauseMode, UpdateState
from tests.fakes import SharedFile

SCHEDULES = int(os.environ.get("WEIGHT_SYNC_SCHEDULES", "200"))
TP_SIZE, NUM_BUCKETS, NUM_UPDATES = 2, 2, 3
STEPS = ("pause", "begin", "load", "end", "flush", "publish", "resume")
ERRORS = (EngineRefused, EngineLost, EngineUnreachable)


@dataclass
class RuleKeepingEngine:
    """An engine that fails where it is told to, and asserts SGLang's rules everywhere else."""

    faults: dict[int, type[SyncError]]
    """By number of the step, counted over the engine's life."""
    info: EngineInfo | None = field(
        default_factory=lambda: parse({"version": "0.5.23", "tp_size": TP_SIZE, "device": "cpu"})
    )
    url: str = "http://engine"
    problem: str = ""
    epoch: int = 1
    weight_version: str = "default"
    paused: bool = False
    session: bool = False
    mixed: bool = False
    """Whether some buckets were loaded since the last version was published."""
    loads: list[bytes] = field(default_factory=list)
    """First entries of the buckets loaded since the session was opened."""
    published: dict[str, list[bytes]] = field(default_factory=dict)
    num_steps: int = 0

    async def probe(self) -> EngineInfo:
        assert self.info is not None
        return self.info

    def assume_paused(self) -> None:
        raise AssertionError("nobody was here before")

    async def _step(self) -> type[SyncError] | None:
        """A step takes a moment; one that was lost may still have happened."""
        self.num_steps += 1
        await asyncio.sleep(0)
        fault = self.faults.get(self.num_steps)
        if fault in (EngineRefused, EngineUnreachable):
            raise fault(Reason.ENGINE_REFUSED, "a scheduled fault")
        return fault

    @staticmethod
    def _answer(fault: type[SyncError] | None) -> None:
        if fault is not None:
            raise fault(Reason.ENGINE_LOST, "a scheduled loss of the answer")

    async def pause(self, mode: PauseMode) -> None:
        fault = await self._step()
        self.paused = True
        self._answer(fault)

    async def begin(self) -> None:
        fault = await self._step()
        assert self.paused, "a session over running generation"
        self.session, self.loads = True, []
        self._answer(fault)

    async def load(self, entries: Sequence[bytes]) -> None:
        assert len(entries) == TP_SIZE
        fault = await self._step()
        assert self.paused
        assert self.session
        assert entries[0] not in self.loads, "a bucket was posted twice"
        self.loads.append(entries[0])
        self.mixed = True
        self._answer(fault)

    async def end(self) -> None:
        fault = await self._step()
        assert self.session
        self.session = False
        self._answer(fault)

    async def end_if_open(self) -> None:
        fault = await self._step()
        self.session = False
        self._answer(fault)

    async def flush(self, patience_s: float) -> bool:
        self._answer(await self._step())
        return True

    async def publish(self, weight_version: str) -> None:
        fault = await self._step()
        assert not self.session, "published before the session was ended"
        assert len(self.loads) == NUM_BUCKETS, "published before all of it was loaded"
        self.weight_version = weight_version
        self.mixed = False
        self.published[weight_version] = list(self.loads)
        self._answer(fault)

    async def resume(self) -> None:
        fault = await self._step()
        assert not self.session, "generation over an open session"
        assert not self.mixed, "generation on mixed weights"
        self.paused = False
        self._answer(fault)


@dataclass(frozen=True)
class Action:
    """One thing that a rank does."""

    what: str
    rank: int
    update: int


ACTIONS = st.builds(
    Action,
    what=st.sampled_from(["update", "update", "send", "cancel", "wait"]),
    rank=st.integers(0, TP_SIZE - 1),
    update=st.integers(1, NUM_UPDATES),
)
FAULTS = st.dictionaries(st.integers(1, 24), st.sampled_from(ERRORS), max_size=3)


@pytest.fixture(scope="module")
def memory() -> Iterator[list[list[Memory]]]:
    """By rank and bucket."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as manager:
        path = str(Path(folder) / "manager.sock")
        manager.bind(path)
        files = [[SharedFile(bytes(64)) for _ in range(NUM_BUCKETS)] for _ in range(TP_SIZE)]
        yield [[SharedMemory(path, file.name, 64) for file in rank] for rank in files]
        for rank in files:
            for file in rank:
                file.close()


def manifest() -> Manifest:
    tensors = [TensorSpec(f"t{number}", "float32", (4,), 0, 16) for number in range(NUM_BUCKETS)]
    return Manifest(tuple(BucketSpec(64, (tensor,)) for tensor in tensors))


class Schedule:
    """Runs actions against one coordinator, and checks what must hold whatever happened."""

    def __init__(self, engine: RuleKeepingEngine, known: KnownManifest, memory: list[list[Memory]]) -> None:
        self.engine = engine
        self.coordinator = Coordinator(engine, Timeouts(collect=0.02, bucket=0.02))
        self.known = known
        self.memory = memory
        self.calls: list[tuple[Action, asyncio.Task[object]]] = []

    async def run(self, actions: Sequence[Action]) -> None:
        for action in actions:
            await getattr(self, action.what)(action)
        ended, hanging = await asyncio.wait([call for _, call in self.calls], timeout=5) if self.calls else ((), ())
        assert not hanging, "a call that never ends"
        for call in ended:
            with suppress(SyncError, asyncio.CancelledError):
                call.result()
        while self.coordinator.current:  # noqa: ASYNC110 - the coordinator has no event for "nothing in hand"
            await asyncio.sleep(0.001)

    async def update(self, action: Action) -> None:
        """All ranks send."""
        for rank in range(TP_SIZE):
            await self.send(Action("send", rank, action.update))

    async def send(self, action: Action) -> None:
        header = Header(
            update_id=f"u{action.update}", weight_version=f"v{action.update}", rank=action.rank, tp_size=TP_SIZE
        )
        handles = dict(enumerate(self.memory[action.rank]))
        call = self.coordinator.update_weights(header, self.known, handles, budget_s=0.05)
        self.calls.append((action, asyncio.create_task(call)))
        await asyncio.sleep(0)

    async def cancel(self, action: Action) -> None:
        for sent, call in self.calls:
            if (sent.rank, sent.update) == (action.rank, action.update):
                call.cancel()
        await asyncio.sleep(0)

    async def wait(self, action: Action) -> None:
        for _ in range(10 * action.update):
            await asyncio.sleep(0)

    def check(self) -> None:
        engine, coordinator = self.engine, self.coordinator
        dirty = coordinator.state is SidecarState.DIRTY
        assert coordinator.state in (SidecarState.READY, SidecarState.DIRTY)
        assert coordinator.ready is not dirty
        for number in range(1, NUM_UPDATES + 1):
            with suppress(SyncError):
                update = coordinator.find(f"u{number}")
                assert update.state.ended
                # An assertion of the engine's above is a defect to the coordinator, which must go on.
                assert update.error is None or "defect" not in update.error.message
                if update.state is UpdateState.COMMITTED:
                    assert len(engine.published[f"v{number}"]) == NUM_BUCKETS
        if not dirty and not engine.faults:
            assert not engine.paused
            assert not engine.session


@settings(max_examples=SCHEDULES, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=12), faults=FAULTS)
def test_no_schedule_breaks_an_invariant(
    memory: list[list[Memory]], actions: list[Action], faults: dict[int, type[SyncError]]
) -> None:
    async def scenario() -> None:
        known = await ManifestStore().add(manifest(), 0)
        schedule = Schedule(RuleKeepingEngine(faults), known, memory)
        await schedule.run(actions)
        schedule.check()

    asyncio.run(scenario())
