"""A group that sends nothing: of an update, what is left is its control.

Invariant: what a ``Fleet`` asks of a group is answered at once, and truthfully but for the bytes.
"""

import socket
from collections.abc import Callable

import torch

MANY = 4096
"""Connections that nobody accepts; each is of a sidecar that has closed it."""


class NoNetwork:
    """In place of ``BroadcastGroup``; a ``MakeGroup``."""

    def __init__(self, name: str, world_size: int, backend: str, join_s: float, timeout_s: float) -> None:
        self.name = name
        self._door = socket.create_server(("", 0), backlog=MANY)  # engines do not come, but their sidecars look
        self.port = int(self._door.getsockname()[1])
        self.backend = backend

    @property
    def is_closed(self) -> bool:
        """Whether it was."""
        return self._door.fileno() < 0

    def join(self) -> None:
        """All are there."""

    def broadcast(self, flat: torch.Tensor) -> "Sent":
        """Everybody has it."""
        return Sent()

    def close(self) -> None:
        """Nothing else is open."""
        self._door.close()

    def turn_away(self, over: Callable[[], bool], seconds: float) -> None:
        """Nobody comes."""


class Sent:
    """A broadcast that was over as it began."""

    def done(self) -> bool:
        """At once."""
        return True

    def check(self) -> None:
        """Nothing fails."""
