"""The update in hand, from its first rank's arrival to its end: what moves it on, and what ends it early.

    begin -> a rank delivers ... the last one does -> applied, by a task of its own -> ended
      |           |                                      |
      +-----------+-> given up                           +-> broken off: an abort, a caller that is gone, a drain

Invariants: one update at a time; nobody who waits for it can stop the task that applies it, but only ask for its end;
and whoever was waiting is woken when it has come.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from sidecar import applier, history, refusals
from sidecar.applier import Applier
from sidecar.callers import WHOLE_UPDATE
from sidecar.config import Timeouts
from sidecar.errors import SyncError
from sidecar.membership import Membership
from sidecar.payload import BucketPayload
from sidecar.place import Place
from sidecar.ranks import Ranks
from sidecar.replay import Replay
from sidecar.served import ServedWeights
from sidecar.tracing import Spans
from sidecar.update import Phase, Update, UpdateState
from sidecar.waiting import Waiting

logger = logging.getLogger(__name__)

BREAK_OFF_S = 5.0
"""At the end of a drain, for an update that cannot complete to be broken off in order."""


class Engine(applier.Engine, Protocol):
    """An engine that updates are applied to, and its life."""

    @property
    def epoch(self) -> int:
        """Counts its lives."""


class InHand:
    """The one update of one engine, if there is one."""

    def __init__(
        self,
        engine: Engine,
        timeouts: Timeouts,
        *,
        membership: Membership,
        served: ServedWeights,
        replay: Replay,
        spans: Spans,
        on_change: Callable[[], None],
        on_ended: Callable[[Update], None],
    ) -> None:
        self._engine = engine
        self._collect_s = timeouts.collect
        self._served = served
        self._spans = spans
        self._on_change = on_change
        self._on_ended = on_ended
        self.place = Place(self.changed)
        self.waiting = Waiting(gone=self._caller_gone, late=self._collect_deadline)
        self._payloads: tuple[BucketPayload, ...] = ()
        self._applying: asyncio.Task[None] | None = None
        self._collect_timer: asyncio.TimerHandle | None = None
        ranks = Ranks(self.waiting.until, timeouts)
        self._applier = Applier(engine, ranks, membership, self._about_to_write, self.changed, replay, spans)

    @property
    def update(self) -> Update | None:
        """The one that is, from its first rank's arrival to its end."""
        return self.place.update

    def begin(self, update: Update, payloads: tuple[BucketPayload, ...]) -> None:
        """Take it in; ``payloads``: what the engine is sent of each of its buckets."""
        self.place.take(update)
        self._payloads = payloads
        self.waiting.begin()
        timer = asyncio.get_running_loop().call_later
        self._collect_timer = timer(self._collect_s, self._collect_deadline, update, self._collect_s)

    def delivered(self, update: Update) -> None:
        """A rank delivered something: start applying once every rank is there."""
        ready = update.state is UpdateState.COLLECTING and (update.model_path is not None or not update.unready())
        if ready and not self._give_up_after_restart(update):
            update.phase_seconds[Phase.COLLECT] = time.monotonic() - update.started
            update.start_applying()
            self._stop_collect_timer()
            self._applying = asyncio.create_task(self._apply(update), name=f"apply {update.id}")
        self.changed()

    async def abort(self, update: Update, error: SyncError) -> None:
        """End it for ``error``, and return when it has ended; raises if nothing can stop it any more."""
        if update.state is UpdateState.COLLECTING:
            self.give_up(update, error)
        elif update.complete:
            raise refusals.not_abortable(update)
        elif update.state is UpdateState.APPLYING:
            self._break_off(update, error)
            await self.waiting.until_over(update)

    def give_up(self, update: Update, error: SyncError) -> None:
        """COLLECTING -> ABORTED."""
        update.end(UpdateState.ABORTED, error)
        self._spans.never_applied(update.trace, update.log_fields, update.started, "aborted", error.message)
        self._stop_collect_timer()
        self._ended(update)

    def engine_changed(self) -> None:
        """The watch has seen something new."""
        if self.update and self.update.state is UpdateState.COLLECTING:
            self._give_up_after_restart(self.update)

    async def drain(self, seconds: float) -> bool:
        """Give up what is only being collected, and let what is applied end; whether nothing is left half-way."""
        if self.update and self.update.state is UpdateState.COLLECTING:
            self.give_up(self.update, refusals.draining())
        update, applying = self.update, self._applying
        if update is None or applying is None:
            return await self.place.ended(seconds)
        done, _ = await asyncio.wait([applying], timeout=seconds)
        if not done:
            self._break_off(update, refusals.draining())
            await asyncio.wait([applying], timeout=BREAK_OFF_S)
        return update.state in (UpdateState.COMMITTED, UpdateState.ABORTED)

    def changed(self) -> None:
        """Wake everyone who waits, to look again."""
        self.waiting.look_again()
        self._on_change()

    async def _apply(self, update: Update) -> None:
        try:
            self._served.touching(update, writing=False)
            await self._applier.apply(update, self._payloads, stay_held=self._served.stays_held)
        except Exception as bug:  # the edge of a task that nobody awaits: it must not vanish
            logger.exception("update %s: a defect in the sidecar", update.id, extra=update.log_fields)
            update.end(UpdateState.FAILED, refusals.defect(update, bug))
        self._ended(update)

    def _about_to_write(self, update: Update) -> None:
        self._served.touching(update, writing=True)

    def _break_off(self, update: Update, error: SyncError) -> None:
        update.abort_request = error
        self.changed()

    def _ended(self, update: Update) -> None:
        update.ended_at = time.monotonic()
        self.waiting.end()
        self._applying = None
        self._payloads = ()
        self.place.leave()
        self._served.ended(update)
        logger.info("%s", history.sentence(update), extra=update.log_fields)
        self._on_ended(update)
        self.changed()

    def _stop_collect_timer(self) -> None:
        if self._collect_timer:
            self._collect_timer.cancel()
            self._collect_timer = None

    def _give_up_after_restart(self, update: Update) -> bool:
        """What was checked against one server must not be loaded into another."""
        if update.epoch == self._engine.epoch:
            return False
        self.give_up(update, refusals.restarted_meanwhile(update.id))
        return True

    def _collect_deadline(self, update: Update, seconds: float) -> None:
        if update.state is UpdateState.COLLECTING:
            what = "to arrive" if update.num_buckets == 1 else "to arrive with their first bucket"
            self.give_up(update, refusals.missing(update, update.missing(), what, seconds))

    def _caller_gone(self, update: Update, rank: int, bucket: int) -> None:
        """What was not loaded yet cannot be any more: memory, or the sender, may be gone with its owner."""
        error = refusals.caller_gone(update, rank)
        needed = update.needs(rank) if bucket == WHOLE_UPDATE else bucket >= update.num_posted
        if update.state is UpdateState.COLLECTING:
            self.give_up(update, error)
        elif update.state is UpdateState.APPLYING and needed:
            self._break_off(update, error)
