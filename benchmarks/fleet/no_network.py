"""A group that sends nothing: of an update, what is left is its control.

Invariant: what a ``Fleet`` asks of a group is answered at once, and truthfully but for the bytes.
"""

import torch

ANY_PORT = 29500
"""Scripted engines do not connect to it."""


class NoNetwork:
    """In place of ``BroadcastGroup``; a ``MakeGroup``."""

    def __init__(self, name: str, world_size: int, backend: str, join_s: float, timeout_s: float) -> None:
        self.name = name
        self.port = ANY_PORT
        self.backend = backend

    def join(self) -> None:
        """All are there."""

    def broadcast(self, flat: torch.Tensor) -> "Sent":
        """Everybody has it."""
        return Sent()

    def close(self) -> None:
        """Nothing is open."""


class Sent:
    """A broadcast that was over as it began."""

    def done(self) -> bool:
        """At once."""
        return True

    def check(self) -> None:
        """Nothing fails."""
