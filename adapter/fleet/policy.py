"""How many engines of a fleet must take an update, and what happens to those that did not. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """One of ``ALL_OR_NOTHING``, ``BEST_EFFORT`` and ``quorum(n)``."""

    name: str
    at_least: int | None
    """Engines; None: all."""

    def needed(self, members: int) -> int:
        """How many of so many members must hold the update ready before it is published."""
        return members if self.at_least is None else self.at_least

    def __str__(self) -> str:
        return self.name


ALL_OR_NOTHING = Policy("all-or-nothing", None)
"""A version is published by all members or by none. One that fails half-way leaves those that had it with weights that
nobody may see: they are dirty, and generation stays paused until the next update."""
BEST_EFFORT = Policy("best-effort", 1)
"""Whoever can, does."""


def quorum(engines: int) -> Policy:
    """At least so many engines."""
    if engines < 1:
        raise ValueError(f"a quorum is of 1 engine or more, not {engines}")
    return Policy(f"quorum of {engines}", engines)
