"""An SGLang server in memory, at the level of the applier's protocol: it keeps SGLang's rules and asserts ours.

Every step may be planned to fail in one of the ways of ``Failure``. Invariants that it asserts itself: weights are
written only while generation is held (or by one bucket that carries its version), inside a session where there are
sessions, from memory that nobody loaded before; and generation never goes on with weights of two updates.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import cast

from sidecar.engine.info import EngineInfo, parse
from sidecar.errors import (
    EngineBusy,
    EngineDown,
    EngineError,
    EngineLost,
    EngineRefused,
    EngineRestarted,
    EngineTimeout,
    EngineUnreachable,
    Reason,
)
from sidecar.group import NOT_RECEIVED, Group
from sidecar.header import PauseMode, Selector
from sidecar.payload import LOAD_FORMAT
from tests.fakes import shared_memory

STEP_S = 0.01
TIMEOUT_S = 60.0
CHECKPOINT = "checkpoint"
MEMORY_NAME = re.compile(rb"/torch_\d+_fake_\d+")


class Failure(Enum):
    """What happens to one step."""

    NONE = auto()
    REFUSE = auto()
    """Not done, and said so."""
    CUT = auto()
    """Not done, and no answer."""
    LOSE = auto()
    """Done, and no answer."""
    TIME_OUT = auto()
    """Done at once, and no answer for a minute."""
    NEVER_SENT = auto()
    DIE = auto()
    """The process ends before it acts."""
    DIE_AFTER = auto()


@dataclass
class RuleKeepingEngine:
    """One address, and the servers that live there one after the other."""

    tp_size: int
    release: str
    content_of: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By memory name: what would be loaded from it, as (update, tensor)."""
    planned: list[Failure] = field(default_factory=list)
    """For the steps to come, in order."""
    info: EngineInfo | None = None
    url: str = "http://engine"
    problem: str = ""
    epoch: int = 0
    weight_version: str = ""
    held: bool = False
    alive: bool = True
    busy: bool = False
    paused: bool = False
    session: bool = False
    weights: dict[str, str] = field(default_factory=dict)
    """By tensor: the update that it came from."""
    opened: set[str] = field(default_factory=set)
    """Names of the memory that was opened, over all lives."""
    bound: int = 0
    groups: set[str] = field(default_factory=set)
    """That it has joined."""
    broadcasts: str = ""
    """The update whose weights the groups' sender broadcasts now."""

    def __post_init__(self) -> None:
        self.start()

    # What happens to it.

    def start(self) -> None:
        """A new process."""
        self.alive, self.paused, self.session, self.held = True, False, False, False
        self.weights = {}
        self.groups = set()
        self.weight_version = "default"
        self.epoch += 1
        self.info = parse(
            {"version": self.release, "tp_size": self.tp_size, "device": "cpu", "random_seed": self.epoch}
        )

    def die(self) -> None:
        """SIGKILL."""
        self.alive = self.paused = self.session = False
        self.weights = {}

    # What the watch does.

    async def probe(self) -> EngineInfo:
        if self.info is None or not self.alive:
            raise EngineDown(Reason.ENGINE_UNREACHABLE, "nobody listens")
        return self.info

    def attach(self) -> None:
        if self.info is None:
            raise EngineUnreachable(Reason.ENGINE_UNREACHABLE, "gone")
        self.bound = self.epoch

    # The steps.

    @property
    def uses_sessions(self) -> bool:
        return self.info is not None and self.info.dialect.uses_sessions

    async def pause(self, mode: PauseMode, limit_s: float) -> None:
        assert limit_s >= 0
        self.attach()
        if mode is PauseMode.NONE and not self.uses_sessions:
            return
        if mode in (PauseMode.NONE, PauseMode.DRAIN) and self.busy and not self.paused:
            await asyncio.sleep(limit_s if mode is PauseMode.DRAIN else 0)
            raise EngineBusy(Reason.ENGINE_BUSY, "requests are in flight")
        await self._step(self._pause)

    async def hold(self) -> None:
        if not self.paused:
            await self._step(self._pause)

    def _pause(self) -> None:
        self.paused = True

    async def begin(self, selector: Selector, limit_s: float) -> None:
        if self.uses_sessions:
            await self._step(self._begin)

    def _begin(self) -> None:
        assert self.paused, "a session over running generation"
        self.session = True

    async def session_is_open(self) -> bool:
        await self._step(lambda: None)
        return self.session

    async def load(
        self, entries: Sequence[bytes], load_format: str, selector: Selector, weight_version: str | None
    ) -> None:
        assert len(entries) == self.tp_size
        assert load_format == LOAD_FORMAT, "this server has no replay loader"
        await self._step(lambda: self._load(entries, weight_version))

    def _load(self, entries: Sequence[bytes], weight_version: str | None) -> None:
        if self.uses_sessions and not self.session:
            raise EngineRefused(Reason.ENGINE_REFUSED, "must run between begin and end")
        assert self.paused or weight_version is not None, "weights written under running generation"
        names = [_memory_name(entry) for entry in entries]
        assert not self.opened.intersection(names), "memory was posted twice"
        self.opened.update(names)
        for name in names:
            update, tensor = self.content_of[name]
            self.weights[tensor] = update
            shared_memory.release(name)
        if weight_version is not None:
            self._publish(weight_version)
        self.check_generation()

    async def receive(self, tensors: Mapping[str, object], group_name: str, selector: Selector) -> None:
        """One that is refused is so by the first rank, which has received nothing; the others have."""
        names = cast("list[str]", tensors["names"])
        refuses = self.planned[:1] == [Failure.REFUSE]
        try:
            await self._step(lambda: self._receive(names, group_name, first_rank=0))
        except EngineRefused as refusal:
            if not refuses:
                raise
            self._receive(names, group_name, first_rank=1)
            raise EngineRefused(Reason.ENGINE_REFUSED, NOT_RECEIVED) from refusal

    def _receive(self, names: list[str], group_name: str, first_rank: int) -> None:
        assert group_name in self.groups, "SGLang up to 0.5.20 dies of a group that it does not know"
        if self.uses_sessions and not self.session:
            raise EngineRefused(Reason.ENGINE_REFUSED, "must run between begin and end")
        assert self.paused, "weights written under running generation"
        for rank in range(first_rank, self.tp_size):
            self.weights.update({f"rank {rank} {name}": self.broadcasts for name in names})

    async def reach(self, group: Group) -> None:
        """Trainers are always there."""

    async def join_group(self, group: Group) -> None:
        await self._step(lambda: self._join(group.name))

    def _join(self, name: str) -> None:
        assert name not in self.groups, "SGLang refuses a name that is taken"
        self.groups.add(name)

    async def leave_group(self, name: str) -> bool:
        await self._step(lambda: self.groups.discard(name))
        return True

    async def load_from_disk(self, model_path: str) -> None:
        await self._step(lambda: self._load_from_disk(model_path))

    def _load_from_disk(self, model_path: str) -> None:
        assert self.paused
        assert not self.session
        self.weights = dict.fromkeys(self.weights, model_path)

    async def settle(self, lost: EngineLost) -> None:
        if not self.alive:
            raise EngineDown(Reason.ENGINE_UNREACHABLE, "nobody listens")

    async def serves(self, weight_version: str) -> bool:
        return self.alive and self.weight_version == weight_version

    async def abort_requests(self) -> None:
        await self._step(lambda: None)

    async def end(self) -> None:
        if self.uses_sessions:
            await self._step(self._end)

    def _end(self) -> None:
        if not self.session:
            raise EngineRefused(Reason.ENGINE_REFUSED, "no session is open")
        self.session = False

    async def end_if_open(self) -> None:
        await self._step(self._end_if_open)

    def _end_if_open(self) -> None:
        self.session = False

    async def flush(self, patience_s: float) -> bool:
        try:
            await self._step(lambda: None)
        except (EngineRefused, EngineLost):
            return False
        return True

    async def checksums(self) -> list[dict[str, str]]:
        await self._step(lambda: None)
        return [dict(self.weights) for _ in range(self.tp_size)]

    async def publish(self, weight_version: str) -> None:
        await self._step(lambda: self._publish(weight_version))

    def _publish(self, weight_version: str) -> None:
        assert not self.session, "published before the session was ended"
        assert len(set(self.weights.values())) <= 1, "published before all of it was loaded"
        self.weight_version = weight_version

    async def resume(self) -> None:
        await self._step(self._resume)

    def _resume(self) -> None:
        self.paused = self.held = False
        self.check_generation()

    def check_generation(self) -> None:
        """Whatever runs must run on the weights of one update, under its own version."""
        if self.paused or not self.alive:
            return
        assert not self.session, "generation over an open session"
        sources = set(self.weights.values())
        assert len(sources) <= 1, f"generation on weights of {sources}"
        if sources and self.weight_version != "default":
            assert sources == {self.weight_version}, f"{sources} served as {self.weight_version}"

    async def _step(self, act: Callable[[], None]) -> None:
        """One call of the update in hand; what is planned for it happens."""
        if self.bound != self.epoch:
            raise EngineRestarted(Reason.ENGINE_RESTARTED, "another server")
        if not self.alive:
            raise EngineDown(Reason.ENGINE_UNREACHABLE, "nobody listens")
        failure = self.planned.pop(0) if self.planned else Failure.NONE
        epoch = self.epoch
        await asyncio.sleep(STEP_S)
        if self.epoch != epoch or not self.alive:
            raise EngineLost(Reason.ENGINE_LOST, "it died meanwhile")
        await self._happen(failure, act)

    async def _happen(self, failure: Failure, act: Callable[[], None]) -> None:
        if failure in _NOT_DONE:
            if failure is Failure.DIE:
                self.die()
            raise _NOT_DONE[failure](Reason.ENGINE_REFUSED, "a planned failure")
        act()
        if failure is Failure.TIME_OUT:
            await asyncio.sleep(TIMEOUT_S)
            raise EngineTimeout(Reason.ENGINE_LOST, "a planned time-out")
        if failure in (Failure.LOSE, Failure.DIE_AFTER):
            if failure is Failure.DIE_AFTER:
                self.die()
            raise EngineLost(Reason.ENGINE_LOST, "a planned loss of the answer")


_NOT_DONE: dict[Failure, type[EngineError]] = {
    Failure.REFUSE: EngineRefused,
    Failure.CUT: EngineLost,
    Failure.NEVER_SENT: EngineUnreachable,
    Failure.DIE: EngineLost,
}


def _memory_name(entry: bytes) -> str:
    (name,) = MEMORY_NAME.findall(entry)
    return str(name.decode())
