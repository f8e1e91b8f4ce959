"""Noticing that a call failed because a process of the engine is gone.

Invariant: every rank on the processes' host tells it, whoever started them: they are known by id and start time.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from adapter.errors import (
    EngineUnreachable,
    LaunchError,
    SidecarUnreachable,
    UpdateAborted,
    UpdateFailed,
    WeightSyncError,
)
from adapter.verl_engine.facts import EngineFacts

_SOON_S = 3.0
_POLL_S = 0.1
# A process that dies cuts its connections some moments before it is gone.
_MAY_BE_A_DEATH = (EngineUnreachable, SidecarUnreachable, UpdateAborted, UpdateFailed)


class Deaths:
    """Looks at the engine's processes before a call, and again when it failed."""

    def __init__(self, facts: EngineFacts, host: str) -> None:
        self._facts = facts
        self._host = host

    def check(self) -> None:
        """Raise ``LaunchError`` with the end of the log of a process that has ended."""
        self._facts.check_alive(self._host)

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Raises ``LaunchError`` as ``check`` does, in place of what follows."""
        self.check()
        with self.explained():
            yield

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises ``LaunchError`` in place of the failures that follow from a death."""
        try:
            yield
        except WeightSyncError as error:
            self._look(error, _SOON_S if isinstance(error, _MAY_BE_A_DEATH) else 0.0)
            raise

    def _look(self, cause: WeightSyncError, for_s: float) -> None:
        give_up = time.monotonic() + for_s
        while True:
            try:
                self.check()
            except LaunchError as death:
                raise death from cause
            if time.monotonic() >= give_up:
                return
            time.sleep(_POLL_S)
