"""Collects every rank's part of an update, has it applied once, and remembers how it went.

With ``in_hand`` and its applier the only writer of updates. Lives on one event loop, so nothing is locked. Invariants:

1. The engine is untouched until every rank has brought the same checked manifest, and its first bucket or the wish
   that the engine be made ready.
2. One update is in hand at a time, and it is applied by a task of its own (``in_hand``): callers only wait for it,
   so one that cancels, times out or dies changes nothing about weights that the engine was given.
3. Every wait is bounded, by the caller's deadline or a setting, and says for which ranks or bucket it was.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from sidecar import admission, history, in_hand, membership, recovery, refusals, standing
from sidecar.callers import WHOLE_UPDATE
from sidecar.config import Timeouts
from sidecar.engine.info import EngineInfo
from sidecar.errors import UpdateConflict
from sidecar.group import Group, check_dense, check_group_name
from sidecar.header import Header
from sidecar.history import UpdateHistory
from sidecar.in_hand import InHand
from sidecar.journal import Journal
from sidecar.manifest import Manifest
from sidecar.manifest_check import Allowance, Checked, Report
from sidecar.manifest_store import KnownManifest
from sidecar.membership import Membership
from sidecar.memory import Memory, is_kept
from sidecar.payload import BucketPayload
from sidecar.recovery import Recovery
from sidecar.references import References
from sidecar.replay import Replay
from sidecar.served import ServedWeights
from sidecar.standing import Standing
from sidecar.tracing import TRACE, Spans
from sidecar.update import Phase, Update, UpdateState

logger = logging.getLogger(__name__)


class WatchedEngine(in_hand.Engine, membership.Engine, recovery.Engine, standing.Engine, Protocol):
    """An engine, and what the watch knows of it."""

    async def probe(self) -> EngineInfo:
        """Ask it now; raises ``EngineError``."""


class Coordinator:
    """The sidecar's mind; see the module."""

    def __init__(
        self,
        engine: WatchedEngine,
        timeouts: Timeouts,
        on_change: Callable[[], None] = lambda: None,
        on_ended: Callable[[Update], None] = lambda _: None,
        journal: Journal | None = None,
        replay: Replay | None = None,
        accept_checkpoint: bool = False,
        require_update: bool = False,
        spans: Spans | None = None,
    ) -> None:
        self._engine = engine
        self._on_ended = on_ended
        self._replay = replay or Replay("", enabled=False)
        self._updates = UpdateHistory()
        self.references = References()
        self._draining = False
        self._served = ServedWeights(
            engine, journal or Journal(None), accept_checkpoint=accept_checkpoint, require_update=require_update
        )
        self._membership = Membership(engine, self._served.fence)
        self._in_hand = InHand(
            engine,
            timeouts,
            membership=self._membership,
            served=self._served,
            replay=self._replay,
            spans=spans or Spans(),
            on_change=on_change,
            on_ended=self._ended,
        )
        self._place, self._waiting = self._in_hand.place, self._in_hand.waiting
        self._recovery = Recovery(engine, self._served, self.changed)
        self.standing = Standing(engine, self._served, lambda: (self.current, self._draining))

    # What anyone may ask.

    @property
    def engine(self) -> EngineInfo | None:
        """The engine, while it can be reached."""
        return self._engine.info

    @property
    def epoch(self) -> int:
        """Which of the engine's lives this is."""
        return self._engine.epoch

    @property
    def group(self) -> Group | None:
        """The one that the engine is in."""
        return self._membership.group

    @property
    def current(self) -> Update | None:
        """The update in hand."""
        return self._in_hand.update

    @property
    def last(self) -> Update | None:
        """The newest update that ended."""
        return self._updates.last_ended

    def find(self, update_id: str) -> Update:
        """One of the last updates by id; raises ``NotKnown``."""
        return self._updates.find(update_id)

    async def check(self, known: KnownManifest, allow: Allowance) -> Report:
        """A dry run: what would be wrong with an update of this manifest."""
        info = await self.engine_info()
        return await self.references.report(known, info.model_path, allow, selector=None)

    # What a rank does.

    async def update_weights(
        self, header: Header, known: KnownManifest, handles: Mapping[int, Memory], budget_s: float
    ) -> Update:
        """One rank's whole part; returns the committed update or raises why there is none."""
        if header.group_name or header.two_phase:
            raise refusals.over_a_group(header.update_id, header.rank, "UpdateWeights")
        admission.check_every_bucket_has_memory(handles, known.manifest, header.rank)
        update = await self._join(header, known, handles)
        update.wait_until(time.monotonic() + budget_s)
        if update.state.ended:
            admission.check_repeated(update, header.rank, handles, self._engine.epoch)
        else:
            for bucket, memory in handles.items():
                update.deliver(header.rank, bucket, memory)
            update.deliveries[header.rank].committed = True
            self._in_hand.delivered(update)
        return await self._until_ended(update, header.rank, budget_s)

    async def update_from_disk(self, header: Header, model_path: str, budget_s: float) -> Update:
        """The engine loads ``model_path`` (or, if that is empty, what it was started with) as a version of its own."""
        info = await self.engine_info()
        header.check(1)
        update = self._updates.get(header.update_id)
        if update is None or update.may_be_tried_again:
            self._check_new(header, info, num_buckets=0)
            update = self._new_update(header, info, model_path=model_path or info.model_path)
            update.join(header.rank).committed = True
            update.wait_until(time.monotonic() + budget_s)
            self._start(update)
            self._in_hand.delivered(update)
        elif (update.model_path, update.header.weight_version, update.epoch) != (
            model_path or info.model_path,
            header.weight_version,
            self._engine.epoch,
        ):
            raise refusals.id_reused(update, header.rank)
        return await self._until_ended(update, header.rank, budget_s)

    async def begin(self, header: Header, known: KnownManifest) -> Update:
        """One rank announces its part, whose buckets follow."""
        update = await self._join(header, known, {})
        if update.state.ended:
            raise refusals.id_reused(update, header.rank)
        return update

    async def push(self, update_id: str, rank: int, bucket: int, memory: Memory, budget_s: float) -> None:
        """One rank's memory for one bucket; returns when the engine has loaded it."""
        update = self._joined(update_id, rank)
        if update.header.group_name:
            raise refusals.over_a_group(update_id, rank, "PushBucket")
        if not 0 <= bucket < update.num_buckets:
            raise refusals.no_such_bucket(update, rank, bucket)
        update.wait_until(time.monotonic() + budget_s)
        if update.state is UpdateState.COMMITTED:
            admission.check_repeated(update, rank, {bucket: memory}, self._engine.epoch)
        elif not update.state.ended:
            if update.deliveries[rank].handles.get(bucket) != memory:
                self._admit(update, rank, {bucket: memory})
            update.deliver(rank, bucket, memory)
            self._in_hand.delivered(update)
        await self._until_loaded(update, rank, bucket, budget_s)

    async def prepare(self, update_id: str, rank: int, budget_s: float) -> Update:
        """One rank wants the engine to wait for its first bucket; returns when it does."""
        update = self._joined(update_id, rank)
        update.wait_until(time.monotonic() + budget_s)
        update.deliveries[rank].prepared = True
        self._in_hand.delivered(update)
        ready = self._waiting.until(lambda: update.receiving or update.state.ended)
        await self._waiting.call(update, rank, 0, ready, budget_s)
        return self._unbroken(update)

    async def commit(self, update_id: str, rank: int, budget_s: float) -> Update:
        """One rank has pushed everything, or broadcasts it now.

        Returns the update once it is committed, or in two phases ready to be published; raises why it is neither.
        """
        update = self._joined(update_id, rank)
        if not update.state.ended:
            admission.check_commit(update, rank)
        update.deliveries[rank].committed = True
        self.changed()
        if not update.header.two_phase:
            return await self._until_ended(update, rank, budget_s)
        ready = self._waiting.until(lambda: update.phase is Phase.DECIDE or update.state.ended)
        await self._waiting.call(update, rank, WHOLE_UPDATE, ready, budget_s)
        return self._unbroken(update)

    async def publish(self, update_id: str, rank: int, budget_s: float) -> Update:
        """One rank's word that the version is to be published; returns the committed update or raises."""
        update = self._joined(update_id, rank)
        said = update.deliveries[rank].published
        if not (update.state.ended or said) and (update.phase is not Phase.DECIDE or not update.header.two_phase):
            raise refusals.not_ready_to_publish(update, rank)
        update.deliveries[rank].published = True
        self.changed()
        return await self._until_ended(update, rank, budget_s)

    async def join_group(self, group: Group) -> None:
        """The engine joins ``group``, over which updates may come then; raises why it does not."""
        info = await self.engine_info()
        group.check(info.tp_size, info.device)
        await self._place.claiming(f"joining group {group.name!r}", lambda: self._membership.join(group))

    async def leave_group(self, name: str) -> bool:
        """The engine leaves its group if it is that one; whether it was."""
        check_group_name(name)
        if self.group is None and self._engine.info is None:
            return False  # what it was in ends with it
        return await self._place.claiming(f"leaving group {name!r}", lambda: self._membership.leave_named(name))

    async def fence(self, why: str, *, pause: bool) -> None:
        """Take the engine out of service until its next complete update; ``pause``: generation, too."""
        await self.engine_info()

        async def take_out() -> None:
            self._served.fence(refusals.own_words(why), held=pause)
            if pause:
                self._engine.attach()
                await self._engine.hold()

        await self._place.claiming("fencing", take_out)

    async def hold(self, update_id: str, rank: int, budget_s: float) -> Update:
        """One rank shows that it lives; returns the update once it has ended, however it did."""
        update = self._joined(update_id, rank)
        await self._waiting.call(
            update, rank, WHOLE_UPDATE, self._waiting.until_over(update), budget_s, refusals.still_going_on
        )
        return update

    async def abort(self, update_id: str, rank: int, why: str, *, even_if_not_begun: bool = False) -> Update:
        """One rank gives the update up for all; raises if nothing can stop it any more.

        ``even_if_not_begun``: an update that is not in hand is noted as aborted, for the ranks that ask or come later.
        """
        before = self._updates.get(update_id)
        if even_if_not_begun and (before is None or before.may_be_tried_again):
            return self._never_begun(update_id, rank, why)
        update = self._joined(update_id, rank, or_gathers_along=True)
        await self._in_hand.abort(update, refusals.aborted_by(update, rank, why))
        return update

    def _never_begun(self, update_id: str, rank: int, why: str) -> Update:
        update = Update(Header(update_id=update_id, weight_version="", rank=rank, tp_size=1), Manifest(()), "")
        update.header.check_id()
        update.join(rank)
        update.started = update.ended_at = time.monotonic()
        update.end(UpdateState.ABORTED, refusals.aborted_by(update, rank, why))
        self._updates.add(update)
        logger.info("%s", history.sentence(update), extra=update.log_fields)
        self.changed()
        return update

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, give up what is only being collected, and let an update that is applied end."""
        self._draining = True
        self.changed()
        return await self._in_hand.drain(seconds)

    def claim(self, by: str) -> None:
        """Take the place of the one update in hand, for another task; raises ``UpdateConflict``. Until ``release``."""
        self._place.claim(by)

    def release(self) -> None:
        """Updates may come again."""
        self._place.release()

    # Joining an update.

    async def _join(self, header: Header, known: KnownManifest, handles: Mapping[int, Memory]) -> Update:
        """Check everything that can be checked, and only then take the rank into its update."""
        info = await self.engine_info()
        header.check(info.tp_size)
        epoch = self._engine.epoch
        if header.group_name:
            check_dense(known.manifest)
        checked = await self.references.report_of(header, known, info.model_path, epoch)
        self._check_still(epoch, header.update_id)
        if not self._delivered_before(header, handles):  # memory that was read cannot be checked again
            admission.check_handles(handles, known.manifest, header.rank, info.placement)
            self._check_kept(header, handles)
        update = self._find_or_start(header, known, checked, info)
        self._agree(update, header, known)
        if not update.state.ended:
            admission.check_own_memory(handles, header.rank, update.deliveries)
            update.join(header.rank)
            update.trace = update.trace or TRACE.get()
            self.changed()
        return update

    async def engine_info(self) -> EngineInfo:
        """The engine, once it can be given something; raises why it cannot."""
        info = self._engine.info
        if info is None:
            info = await self._engine.probe()
            self._recovery.engine_seen()
        await self._recovery.ended()
        if self._draining:
            raise refusals.draining()
        if info.unsupported:
            raise refusals.unsupported_engine(self._engine.url, info.unsupported)
        return info

    def _check_still(self, epoch: int, update_id: str) -> None:
        """What was true before a file was read must be so afterwards."""
        if self._draining:
            raise refusals.draining()
        if self._engine.epoch != epoch:
            raise refusals.restarted_meanwhile(update_id)

    def _delivered_before(self, header: Header, handles: Mapping[int, Memory]) -> bool:
        """Whether this is a call that was made before, with the same memory."""
        update = self._updates.get(header.update_id)
        before = update.deliveries.get(header.rank) if update else None
        return before is not None and bool(handles) and before.handles == handles

    def _find_or_start(self, header: Header, known: KnownManifest, checked: Checked, info: EngineInfo) -> Update:
        existing = self._updates.get(header.update_id)
        if existing and not existing.may_be_tried_again:
            return existing
        if existing and existing.error and existing.concerns(header.rank, time.monotonic()):
            existing.told.add(header.rank)
            raise existing.error
        self._check_new(header, info, len(known.manifest.buckets))
        admission.check_report(checked.report, header)
        update = self._new_update(header, info, known.manifest, known.digest)
        update.checked = checked
        update.notes.extend(finding.message for finding in checked.report.findings)
        self._start(update, known.payloads)
        return update

    def _check_new(self, header: Header, info: EngineInfo, num_buckets: int) -> None:
        """Whether an update may begin now."""
        self._place.check_free(header)
        admission.check_suits_engine(header, info, num_buckets)
        if header.group_name:
            self._membership.check_joined(header.group_name)
        committed = self._updates.committed(header.weight_version, self._engine.epoch)
        admission.check_version(
            header,
            self._engine.weight_version,
            committed=committed,
            dirty=bool(self._served.dirty or self._served.fenced),
        )

    def _new_update(
        self,
        header: Header,
        info: EngineInfo,
        manifest: Manifest = Manifest(()),  # noqa: B008 - frozen
        digest: str = "",
        model_path: str | None = None,
    ) -> Update:
        update = Update(
            header,
            manifest,
            digest,
            info.placement,
            self._engine.epoch,
            info.ep_size,
            engine_tp_size=info.tp_size,
            model_path=model_path,
        )
        update.started, update.trace = time.monotonic(), TRACE.get()
        return update

    def _start(self, update: Update, payloads: tuple[BucketPayload, ...] = ()) -> None:
        self._in_hand.begin(update, payloads)
        self._updates.add(update)

    def _agree(self, update: Update, header: Header, known: KnownManifest) -> None:
        """Ranks must send the same: a difference while collecting gives the update up for all of them."""
        try:
            update.check_same(header, known.manifest, known.digest)
        except UpdateConflict as difference:
            if update.state.ended:
                raise refusals.id_reused(update, header.rank) from difference
            if update.state is UpdateState.COLLECTING:
                self._in_hand.give_up(update, difference)
                update.told.add(header.rank)
            raise

    def _joined(self, update_id: str, rank: int, *, or_gathers_along: bool = False) -> Update:
        """``or_gathers_along``: of an update over a group, it is enough that the sender has."""
        update = self.find(update_id)
        if or_gathers_along and update.header.group_name and rank not in update.deliveries:
            rank = update.header.rank
        if rank not in update.deliveries:
            raise refusals.not_begun(update_id, rank)
        update.check_owner(rank)
        return update

    def _check_kept(self, header: Header, handles: Mapping[int, Memory]) -> None:
        """Memory that the engine has mapped from before can be named to its replay loader alone."""
        if any(map(is_kept, handles.values())) and not self._replay.suits(header, self.engine, self.epoch):
            raise refusals.kept_memory_unusable(header)

    def _admit(self, update: Update, rank: int, handles: Mapping[int, Memory]) -> None:
        self._check_kept(replace(update.header, rank=rank), handles)
        admission.check_handles(handles, update.manifest, rank, update.placement)
        admission.check_own_memory(handles, rank, update.deliveries)

    # What has happened.

    def engine_changed(self) -> None:
        """The watch has seen something new."""
        self._recovery.engine_seen()
        self._in_hand.engine_changed()
        self.changed()

    def changed(self) -> None:
        """Wake everyone who waits, to look again."""
        self._in_hand.changed()

    def _ended(self, update: Update) -> None:
        self.references.ended(update)
        self._on_ended(update)

    # Waiting.

    async def _until_ended(self, update: Update, rank: int, budget_s: float) -> Update:
        await self._waiting.call(update, rank, WHOLE_UPDATE, self._waiting.until_over(update), budget_s)
        return self._unbroken(update)

    @staticmethod
    def _unbroken(update: Update) -> Update:
        if update.error:
            raise update.error
        return update

    async def _until_loaded(self, update: Update, rank: int, bucket: int, budget_s: float) -> None:
        loaded = self._waiting.until(lambda: update.num_loaded > bucket or update.state.ended)
        await self._waiting.call(update, rank, bucket, loaded, budget_s)
        if update.num_loaded <= bucket and update.error:
            raise update.error
