"""What weights the engine holds, as far as this sidecar knows.

    in step   the first server seen, or one whose last complete update was committed here
    unsynced  a server that was started again since: it serves its checkpoint
    dirty     an update broke off half-way, here or in a predecessor: weights of no one version, generation held
    fenced    somebody has taken it out of service: the weights are of one version, but not of the fleet's
    left      a predecessor has paused generation and may have written weights: dirty until ``recover`` is through,
              which lets generation go on where no weight was written, and otherwise sees that it is held

A complete update leads from any of them to "in step"; a restart of the engine leads from any to "unsynced". Nothing
else leads out of dirty; a restart of the sidecar leads out of fenced. Invariant: the journal says "begun" whenever a
SIGKILL of this process would leave the engine in between.
"""

import logging
from typing import NamedTuple, Protocol

from sidecar import refusals
from sidecar.engine.info import EngineInfo
from sidecar.errors import SyncError
from sidecar.journal import Entry, Journal
from sidecar.update import Update, UpdateState

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What there is to know of a server's life."""

    @property
    def info(self) -> EngineInfo | None:
        """What it last said about itself; None while it cannot be reached."""

    @property
    def epoch(self) -> int:
        """Counts its lives; 0 until it was seen."""


class _Fence(NamedTuple):
    """Why a life of the engine is out of service, and whether its generation is held as well."""

    epoch: int
    why: str
    held: bool


class ServedWeights:
    """The engine's weights, over its lives."""

    def __init__(
        self, engine: Engine, journal: Journal, *, accept_checkpoint: bool, require_update: bool = False
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._accept_checkpoint = accept_checkpoint
        self._left = journal.unfinished()
        self.recoverable: Entry | None = None
        """What a predecessor has left this very engine in the middle of, until that was dealt with."""
        # The first server that is seen serves what its operator started it with, as a rule.
        self._in_step_epoch = 0 if require_update else 1
        self._fence: _Fence | None = None
        self._failure: tuple[int, SyncError] | None = None

    @property
    def dirty(self) -> SyncError | None:
        """Why the engine holds weights of no one version, if it does."""
        if self._failure and self._failure[0] == self._engine.epoch:
            return self._failure[1]
        return None

    @property
    def fenced(self) -> str:
        """Why the engine is out of service, if it is."""
        return self._fence.why if self._fence and self._fence.epoch == self._engine.epoch else ""

    def fence(self, why: str, *, held: bool = False) -> None:
        """Out of service until a complete update; ``held``: and no generation before that."""
        logger.warning("the engine is out of service until a complete update: %s", why)
        self._fence = _Fence(self._engine.epoch, why, held or self.stays_held)

    @property
    def stays_held(self) -> bool:
        """Whether generation must not go on before a complete update."""
        fence = self._fence
        return self.dirty is not None or (fence is not None and fence.held and fence.epoch == self._engine.epoch)

    @property
    def unsynced(self) -> bool:
        """Whether the engine serves its checkpoint, having had no complete update since it started."""
        return not self._accept_checkpoint and self._engine.epoch > self._in_step_epoch

    def engine_seen(self) -> None:
        """The engine answers: see whether a predecessor has left it in between."""
        info, left = self._engine.info, self._left
        if self._failure and self._failure[0] != self._engine.epoch:  # the dirt has gone with its server
            self._failure = None
            self._journal.clear()
        if info is None or left is None:
            return
        self._left = None
        if left.is_about(info.seed, info.process):
            logger.warning("update %s of a predecessor was not finished: the engine is dirty", left.update_id)
            self._failure = (self._engine.epoch, refusals.left_unfinished(left.update_id))
            self.recoverable = left
        else:
            self._journal.clear()

    def recovered(self, *, whole: bool) -> None:
        """What a predecessor left was dealt with; ``whole``: the engine serves what it served before."""
        self.recoverable = None
        if whole:
            self._failure = None
            self._journal.clear()

    def touching(self, update: Update, *, writing: bool) -> None:
        """``update`` is about to pause the engine, or to write its first weight."""
        info = self._engine.info
        entry = Entry(
            update_id=update.id,
            weight_version=update.header.weight_version,
            engine_seed=info.seed if info else "",
            engine_process=info.process if info else "",
            written=writing or self.stays_held,
        )
        try:
            self._journal.begin(entry)
        except OSError as error:
            logger.warning("no journal of update %s (%s): a killed sidecar would not be noticed", update.id, error)

    def ended(self, update: Update) -> None:
        """``update`` is over."""
        if update.state is UpdateState.COMMITTED:
            self._in_step_epoch = self._engine.epoch
            self._failure = self._fence = None
        elif update.state is UpdateState.FAILED:
            assert update.error is not None
            self._failure = (self._engine.epoch, update.error)
        if self.dirty is None:
            self._journal.clear()
