"""The invariants of the architecture, whatever ranks, engine, sidecar and clock do, in whatever order.

Hypothesis's stateful testing draws the schedules; `WEIGHT_SYNC_SCHEDULES` sets how many (`make faults`: 10,000).
After each schedule time runs until nobody waits any more, and one healthy update must heal whatever is left.
"""

import asyncio
import os
import socket
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidecar.config import Timeouts
from sidecar.coordinator import Coordinator
from sidecar.errors import SyncError
from sidecar.group import Group
from sidecar.header import Header, PauseMode
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.manifest_store import KnownManifest, ManifestStore
from sidecar.memory import SharedMemory
from sidecar.standing import SidecarState
from sidecar.update import UpdateState
from tests.fakes import SharedFile
from tests.model.engine import STEP_S, Failure, RuleKeepingEngine
from tests.model.journal import MemoryJournal
from tests.model.virtual_time import VirtualTimeLoop

SCHEDULES = int(os.environ.get("WEIGHT_SYNC_SCHEDULES", "150"))
STEPS = 40
TP_SIZE = 2
BUCKET_BYTES = 64
BUDGET_S = 500.0

ranks = st.integers(0, TP_SIZE - 1)
buckets = st.integers(0, 2)
moments = st.integers(0, 14)
"""Half a step of the engine each: an update has six to ten steps."""


def in_hand(schedules: "Schedules") -> bool:
    """Whether an update is; what disturbs it is drawn only then."""
    return schedules.coordinator.current is not None


def engine_is_down(schedules: "Schedules") -> bool:
    return not schedules.engine.alive


class Schedules(RuleBasedStateMachine):
    """Ranks, engine, sidecar and clock."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.folder = tempfile.TemporaryDirectory()
        self.manager = socket.socket(socket.AF_UNIX)
        self.manager.bind(self.manager_path)
        self.files: dict[tuple[int, int, int], SharedFile] = {}
        """By update, rank and bucket: what that rank would send, until it was read."""
        self.all_files: list[SharedFile] = []
        self.calls: list[tuple[int, asyncio.Task[Any]]] = []
        self.journal = MemoryJournal()
        self.coordinator: Coordinator
        self.engine: RuleKeepingEngine
        self.pause_mode = PauseMode.RETRACT
        self.group = 0
        """The last one that was to be joined."""
        self.update = 0
        """What ranks send now; a new one comes after all before."""

    @property
    def manager_path(self) -> str:
        return str(Path(self.folder.name) / "manager.sock")

    @initialize(
        num_buckets=st.integers(1, 3),
        release=st.sampled_from(["0.5.23", "0.5.20"]),
        pause_mode=st.sampled_from(PauseMode),
    )
    def start(self, num_buckets: int, release: str, pause_mode: PauseMode) -> None:
        self.num_buckets = num_buckets
        self.pause_mode = pause_mode
        self.engine = RuleKeepingEngine(TP_SIZE, release)
        self.known: KnownManifest = self.run(ManifestStore().add(_manifest(num_buckets), 0))
        self.start_sidecar()

    # What ranks do.

    @rule(new=st.booleans(), moments=moments)
    def all_ranks_send(self, new: bool, moments: int) -> None:
        self.choose(new)
        for rank in range(TP_SIZE):
            self.send(rank)
        self.pass_moments(moments)

    @rule(rank=ranks, new=st.booleans(), moments=moments)
    def one_rank_sends(self, rank: int, new: bool, moments: int) -> None:
        self.choose(new)
        self.send(rank)
        self.pass_moments(moments)

    @rule(new=st.booleans(), hold=st.booleans(), two_phase=st.booleans())
    def all_ranks_begin(self, new: bool, hold: bool, two_phase: bool = False, group_name: str = "") -> None:
        self.choose(new)
        for rank in range(TP_SIZE):
            header = self.header(rank, two_phase=two_phase, group_name=group_name)
            self.call(rank, self.coordinator.begin(header, self.known))
            if hold:
                self.call(rank, self.coordinator.hold(str(self.update), rank, budget_s=BUDGET_S))

    @rule(bucket=buckets, moments=moments)
    def all_ranks_push(self, bucket: int, moments: int) -> None:
        for rank in range(TP_SIZE):
            self.push(rank, bucket)
        self.pass_moments(moments)

    @rule(rank=ranks, bucket=buckets, moments=moments)
    def one_rank_pushes(self, rank: int, bucket: int, moments: int) -> None:
        self.push(rank, bucket)
        self.pass_moments(moments)

    @rule(moments=moments)
    def all_ranks_commit(self, moments: int) -> None:
        current = self.coordinator.current
        if current and current.id == str(self.update) and current.receiving:
            self.engine.broadcasts = current.id
        for rank in range(TP_SIZE):
            self.call(rank, self.coordinator.commit(str(self.update), rank, budget_s=BUDGET_S))
        self.pass_moments(moments)

    @rule(who=st.sampled_from([[0], [1], [0, 1]]), word=st.sampled_from(["prepare", "publish"]), moments=moments)
    def ranks_prepare_or_publish(self, who: list[int], word: str, moments: int) -> None:
        for rank in who:
            self.call(rank, getattr(self.coordinator, word)(str(self.update), rank, budget_s=BUDGET_S))
        self.pass_moments(moments)

    @rule(moments=moments)
    def the_engine_joins_a_group(self, moments: int) -> None:
        self.group += 1
        place = {"master_address": "trainer", "master_port": 1, "rank_offset": 1, "world_size": TP_SIZE + 1}
        group = Group(name=f"group {self.group}", backend="gloo", **place)  # type: ignore[arg-type]
        self.call(0, self.coordinator.join_group(group))
        self.pass_moments(moments)

    @rule()
    def the_engine_leaves_its_group(self) -> None:
        self.call(0, self.coordinator.leave_group(f"group {self.group}"))

    @rule(way=st.integers(0, 3), hold=st.booleans(), calls=st.integers(2, 4), moments=st.sampled_from([3, 8, 14]))
    def an_update_goes_some_of_its_way(self, way: int, hold: bool, calls: int, moments: int) -> None:
        """From memory or over a group, in one phase or two: what the rules above come to one by one all too rarely."""
        over_a_group, two_phase = way % 2, way >= 2
        if over_a_group:
            self.the_engine_joins_a_group(moments)
        self.all_ranks_begin(True, hold, two_phase, group_name=f"group {self.group}" if over_a_group else "")
        for bucket in range(0 if over_a_group else self.num_buckets):
            self.all_ranks_push(bucket, moments)
        for word in ("prepare", "commit", "publish")[: calls - 1]:
            if word == "commit":
                self.all_ranks_commit(moments)
            else:
                self.ranks_prepare_or_publish([0, 1], word, moments)

    @rule(pause=st.booleans())
    def somebody_takes_the_engine_out_of_service(self, pause: bool) -> None:
        self.call(0, self.coordinator.fence("a whim", pause=pause))

    @precondition(in_hand)
    @rule(rank=ranks)
    def one_rank_aborts(self, rank: int) -> None:
        self.call(rank, self.coordinator.abort(str(self.update), rank, "a whim"))

    @rule(new=st.booleans(), moments=moments)
    def somebody_asks_for_a_load_from_disk(self, new: bool, moments: int) -> None:
        self.choose(new)
        version = str(self.update)
        header = Header(update_id=f"disk {version}", weight_version=version, rank=0, tp_size=1)
        self.call(0, self.coordinator.update_from_disk(header, version, budget_s=BUDGET_S))
        self.pass_moments(moments)

    @precondition(in_hand)
    @rule(rank=ranks)
    def rank_dies(self, rank: int) -> None:
        """Every call of its process ends."""
        for owner, call in self.calls:
            if owner == rank:
                call.cancel()
        self.run(asyncio.sleep(0))

    @precondition(in_hand)
    @rule(number=st.integers(0, 20))
    def one_call_is_cancelled(self, number: int) -> None:
        if self.calls:
            self.calls[number % len(self.calls)][1].cancel()
        self.run(asyncio.sleep(0))

    # What the engine does.

    @rule(after=st.integers(0, 9), failures=st.lists(st.sampled_from(Failure), min_size=1, max_size=3))
    def a_step_will_fail(self, after: int, failures: list[Failure]) -> None:
        self.engine.planned = [Failure.NONE] * after + failures

    @precondition(in_hand)
    @rule(starts_again=st.booleans())
    def engine_dies(self, starts_again: bool) -> None:
        self.engine.die()
        if starts_again:
            self.engine_starts_again()

    @precondition(engine_is_down)
    @rule()
    def engine_is_seen_to_be_gone(self) -> None:
        self.engine.info, self.engine.problem = None, "gone"
        self.run(self.tell_of_engine())

    @precondition(engine_is_down)
    @rule()
    def engine_starts_again(self) -> None:
        self.engine.start()
        self.run(self.tell_of_engine())

    @rule(busy=st.booleans())
    def requests_come_and_go(self, busy: bool) -> None:
        self.engine.busy = busy

    # What the sidecar and the clock do.

    @rule(moments=moments)
    def a_few_moments_pass(self, moments: int) -> None:
        self.pass_moments(moments)

    @rule(seconds=st.sampled_from([1.0, 61.0, 301.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @precondition(in_hand)
    @rule()
    def sidecar_is_killed(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.run(asyncio.sleep(0))
        self.files.clear()  # its successor cannot speak for what was sent before
        self.start_sidecar()

    @precondition(in_hand)
    @rule()
    def sidecar_is_stopped_in_order(self) -> None:
        self.run(self.coordinator.drain(30.0))
        self.sidecar_is_killed()

    # What must hold.

    @invariant()
    def nothing_runs_on_mixed_weights(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_generation()

    @invariant()
    def ready_means_ready(self) -> None:
        if hasattr(self, "coordinator") and self.coordinator.standing.ready and self.engine.alive:
            current = self.coordinator.current
            if current is None or current.state is UpdateState.COLLECTING:
                assert not self.engine.paused, "ready, and yet generation is held"
                assert len(set(self.engine.weights.values())) <= 1

    @invariant()
    def no_update_broke_off_by_a_defect(self) -> None:
        if hasattr(self, "coordinator"):
            for number in range(self.update + 1):
                self.check_update(str(number))
                self.check_update(f"disk {number}")

    def check_update(self, update_id: str) -> None:
        with suppress(SyncError):
            update = self.coordinator.find(update_id)
            assert update.error is None or "defect" not in update.error.message, update.error.message
            if not update.state.ended:
                return
            assert update.state is not UpdateState.COMMITTED or not update.unpublished(), "published without a word"
            for (number, _, bucket), file in self.files.items():
                if str(number) == update_id and bucket >= max(update.num_posted, update.num_posted_before):
                    assert file.name not in self.engine.opened, "the outcome denies memory that was opened"

    def teardown(self) -> None:
        try:
            if hasattr(self, "coordinator"):
                self.everything_ends()
                self.one_healthy_update_heals()
        finally:
            for _, call in self.calls:
                if call.done() and not call.cancelled():
                    call.exception()  # somebody has looked at it
            for file in self.all_files:
                file.close()
            self.manager.close()
            self.folder.cleanup()
            self.loop.close()

    def everything_ends(self) -> None:
        self.run(asyncio.sleep(5000.0))
        assert [call for _, call in self.calls if not call.done()] == [], "a call that never ends"
        assert self.coordinator.current is None
        for _, call in self.calls:
            with suppress(SyncError, asyncio.CancelledError):
                call.result()
        if self.coordinator.standing.state is SidecarState.DIRTY:
            assert not self.coordinator.standing.ready
        self.engine.check_generation()

    def one_healthy_update_heals(self) -> None:
        self.engine.planned, self.engine.busy = [], False
        if not self.engine.alive or self.engine.info is None:
            self.engine_starts_again()
        if self.pause_mode is PauseMode.NONE and self.num_buckets > 1 and not self.engine.uses_sessions:
            self.pause_mode = PauseMode.RETRACT  # the other is refused, as it must be
        self.choose(new=True)
        for rank in range(TP_SIZE):
            self.send(rank)
        self.run(asyncio.sleep(100.0))
        assert self.coordinator.find(str(self.update)).state is UpdateState.COMMITTED
        assert (self.coordinator.standing.state, self.engine.paused) == (SidecarState.READY, False)
        assert set(self.engine.weights.values()) == {self.engine.weight_version} == {str(self.update)}

    # How it is done.

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def start_sidecar(self) -> None:
        async def started() -> Coordinator:
            timeouts = Timeouts(collect=300.0, bucket=60.0, decide=60.0)
            self.engine.held = self.engine.paused
            coordinator = Coordinator(self.engine, timeouts, journal=self.journal)
            coordinator.engine_changed()
            return coordinator

        self.coordinator = self.run(started())

    async def tell_of_engine(self) -> None:
        """As the watch does."""
        self.coordinator.engine_changed()

    def call(self, rank: int, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(coroutine)
        self.calls.append((rank, task))
        self.run(asyncio.sleep(0))

    def choose(self, new: bool) -> None:
        self.update += new

    def pass_moments(self, moments: int) -> None:
        self.run(asyncio.sleep(moments * STEP_S / 2))

    def send(self, rank: int) -> None:
        handles = {bucket: self.memory(rank, bucket) for bucket in range(self.num_buckets)}
        self.call(rank, self.coordinator.update_weights(self.header(rank), self.known, handles, budget_s=BUDGET_S))

    def push(self, rank: int, bucket: int) -> None:
        memory = self.memory(rank, bucket)
        self.call(rank, self.coordinator.push(str(self.update), rank, bucket, memory, budget_s=BUDGET_S))

    def header(self, rank: int, *, two_phase: bool = False, group_name: str = "") -> Header:
        name = str(self.update)
        waits = two_phase or group_name
        mode = PauseMode.RETRACT if waits and self.pause_mode is PauseMode.NONE else self.pause_mode
        header = Header(update_id=name, weight_version=name, rank=rank, tp_size=TP_SIZE, pause_mode=mode)
        return replace(header, two_phase=two_phase, group_name=group_name)

    def memory(self, rank: int, bucket: int) -> SharedMemory:
        """The same as before, until it was opened: then the trainer exports anew."""
        place = (self.update, rank, bucket)
        file = self.files.get(place)
        if file is None or file.name in self.engine.opened:
            file = self.files[place] = SharedFile(bytes(BUCKET_BYTES))
            self.all_files.append(file)
            self.engine.content_of[file.name] = (str(self.update), f"rank {rank} t{bucket}")
        return SharedMemory(self.manager_path, file.name, file.size_bytes)


def _manifest(num_buckets: int) -> Manifest:
    tensors = [TensorSpec(f"t{number}", "float32", (16,), 0, BUCKET_BYTES) for number in range(num_buckets)]
    return Manifest(tuple(BucketSpec(BUCKET_BYTES, (tensor,)) for tensor in tensors))


Schedules.TestCase.settings = settings(max_examples=SCHEDULES, stateful_step_count=STEPS)
TestNoScheduleBreaksAnInvariant = Schedules.TestCase
