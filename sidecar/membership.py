"""The torch.distributed group that the engine is in, over which a trainer without shared memory broadcasts weights.

    none -> joining -> joined -> none    left, because another one is joined, or because a broadcast broke off: at
               |                         once, so that no other member waits for this one
               +-> lost                  SGLang may wait for the others still: fenced until a complete update

Invariants: a group is of one life of the engine, and is named in a load only while it is joined: SGLang up to 0.5.20
dies of a name that it does not know. Whatever the engine may be in, it leaves before it joins another one.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from sidecar.errors import EngineError, EngineLost, Reason, UnsuitableEngine
from sidecar.group import Group

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What joining needs of an engine; each call is bounded and raises ``EngineError``."""

    @property
    def epoch(self) -> int:
        """Counts its lives."""

    def attach(self) -> None:
        """Aim the next steps at the server that answers now."""

    async def reach(self, group: Group) -> None:
        """See that its trainer's store is there; raises ``UnsuitableEngine``."""

    async def join_group(self, group: Group) -> None:
        """Return once all members have joined."""

    async def leave_group(self, name: str) -> bool:
        """Whether it was in that group."""


class Membership:
    """The engine's one group."""

    def __init__(self, engine: Engine, lost: Callable[[str], None]) -> None:
        """``lost``: is told in a sentence that the engine's scheduler may be stuck."""
        self._engine = engine
        self._lost = lost
        self._joined: tuple[int, Group] | None = None
        """With the life of the engine that is in it."""
        self._perhaps: dict[str, int] = {}
        """Groups that the engine is in, or may be since an answer was lost, with its life."""

    @property
    def group(self) -> Group | None:
        """The one that the present engine is in."""
        return self._joined[1] if self._joined and self._joined[0] == self._engine.epoch else None

    def check_joined(self, name: str) -> None:
        """Raise ``UnsuitableEngine`` unless the engine is in the group of that name."""
        if self.group is None or self.group.name != name:
            there = f"is in group {self.group.name!r}" if self.group else "is in no group"
            message = f"the engine {there}, not in {name!r}; call InitWeightsUpdateGroup first"
            raise UnsuitableEngine(Reason.GROUP_UNKNOWN, message, groupName=name)

    async def join(self, group: Group) -> None:
        """Leave the group of before, and join this one, if its store is there.

        Raises ``EngineError`` or ``UnsuitableEngine``.
        """
        self._engine.attach()
        await self._engine.reach(group)
        await self.leave()
        epoch = self._perhaps[group.name] = self._engine.epoch
        try:
            await self._engine.join_group(group)
        except EngineLost:
            self._lost(
                f"the engine did not answer while it joined group {group.name!r} of {group.master_address}: its "
                "scheduler may wait for members that never come, until the trainer's process ends or it is restarted"
            )
            raise
        except EngineError:
            del self._perhaps[group.name]
            raise
        self._joined = (epoch, group)
        logger.info("the engine has joined group %s of %d ranks (%s)", group.name, group.world_size, group.backend)

    async def leave_named(self, name: str) -> bool:
        """Leave that group, though it is not known here; whether the engine was in it. Raises ``EngineError``.

        A sidecar before this one may have had it joined, and the engine keeps its connections and memory until then.
        """
        if name in self._perhaps:
            return await self.leave()
        self._engine.attach()
        return await self._engine.leave_group(name)

    async def leave(self) -> bool:
        """Leave the group; whether there was one. Raises nothing: nobody counts on a group that is left."""
        self._joined = None
        self._perhaps = {name: epoch for name, epoch in self._perhaps.items() if epoch == self._engine.epoch}
        return any([await self._leave(name) for name in list(self._perhaps)])

    async def _leave(self, name: str) -> bool:
        try:
            was_joined = await self._engine.leave_group(name)
        except EngineError as error:
            logger.warning("group %s could not be left in order: %s", name, error.message)
            return True
        del self._perhaps[name]
        return was_joined
