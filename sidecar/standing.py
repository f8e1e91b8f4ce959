"""How this sidecar and its engine stand, in one word and one sentence: what probes, ``status`` and orchestrators see.

Derived on every question; owns no state. Invariant: ready means that the engine answers requests with the weights of
one version, and that updates are welcome.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from sidecar.engine.info import EngineInfo
from sidecar.served import ServedWeights
from sidecar.update import Update, UpdateState


class SidecarState(IntEnum):
    """The sidecar in one word; the numbers are the protocol's."""

    ENGINE_UNREACHABLE = 1
    READY = 2
    COLLECTING = 3
    APPLYING = 4
    DIRTY = 5
    DRAINING = 6
    UNSYNCED = 7
    PAUSED = 8
    FENCED = 9


class Engine(Protocol):
    """What is known of the engine."""

    @property
    def url(self) -> str:
        """Where it listens."""

    @property
    def problem(self) -> str:
        """Why ``info`` is None, in a sentence."""

    @property
    def info(self) -> EngineInfo | None:
        """What it last said about itself; None while it cannot be reached."""

    @property
    def held(self) -> bool:
        """Whether it takes no requests."""

    @property
    def weight_version(self) -> str:
        """What its answers carry."""


InHand = Callable[[], tuple[Update | None, bool]]
"""The update in hand, and whether the sidecar is draining."""


class Standing:
    """One sidecar's."""

    def __init__(self, engine: Engine, served: ServedWeights, in_hand: InHand) -> None:
        self._engine = engine
        self._served = served
        self._in_hand = in_hand

    @property
    def state(self) -> SidecarState:
        """In one word."""
        current, draining = self._in_hand()
        if draining:
            return SidecarState.DRAINING
        if current and current.state is UpdateState.APPLYING:
            return SidecarState.APPLYING
        if self._engine.info is None:
            return SidecarState.ENGINE_UNREACHABLE
        if self._served.dirty:
            return SidecarState.DIRTY
        if current:
            return SidecarState.COLLECTING
        if self._served.unsynced:
            return SidecarState.UNSYNCED
        if self._served.fenced:
            return SidecarState.FENCED
        return SidecarState.PAUSED if self._engine.held else SidecarState.READY

    @property
    def reason(self) -> str:
        """Why updates or answers are held up, where they are."""
        if self._engine.info is None:
            return self._engine.problem or f"the engine at {self._engine.url} has not answered yet"
        if self._served.dirty:
            return self._served.dirty.message
        if self._served.unsynced:
            return "the engine has started and serves its checkpoint; send a complete update"
        if self._served.fenced:
            return f"out of service until a complete update: {self._served.fenced}"
        if self._held_by_others:
            return "the engine takes no requests (/ready): it starts, or was paused; a complete update lets it go on"
        return self._engine.info.unsupported

    @property
    def ready(self) -> bool:
        """Whether the engine serves the weights of one version, and updates are welcome."""
        info, served = self._engine.info, self._served
        in_step = not (served.dirty or served.unsynced or served.fenced or self._held_by_others)
        draining = self._in_hand()[1]
        return not draining and in_step and info is not None and not info.unsupported

    @property
    def weight_version(self) -> str:
        """What the engine serves; empty while that is no one version."""
        return "" if self._served.dirty or self._engine.info is None else self._engine.weight_version

    @property
    def _held_by_others(self) -> bool:
        current, _ = self._in_hand()
        applying = current is not None and current.state is UpdateState.APPLYING
        return self._engine.held and not applying
