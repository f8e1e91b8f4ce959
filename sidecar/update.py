"""One update as a state machine: pure, without waiting, time or I/O.

Written by the coordinator, ``in_hand`` and the applier alone.

                 every rank joined with one manifest
                 and delivered its first bucket, or
                 asked for the engine to be made ready      published
    COLLECTING ------------------------------> APPLYING ----------------> COMMITTED
        |                                        |   |
        | a deadline, a difference, an abort     |   | broke off with the engine restored
        +----------------> ABORTED <-------------+---+
                                                 |
                                                 +--- broke off after the engine was touched ---> FAILED (dirty)

A disk update has no buckets and waits for nobody: it is COLLECTING for no longer than its own call takes.

Invariants: the engine is untouched in COLLECTING and ABORTED; ``num_posted`` counts buckets whose POST was begun,
so the memory of any bucket at or above it was never seen by the engine; nothing leaves an ended state.
"""

import time
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf

from sidecar.errors import (
    Forbidden,
    RankAlreadyDelivered,
    Reason,
    SyncError,
    UpdateConflict,
)
from sidecar.header import MAX_TEXT, Header
from sidecar.identity import CALLER
from sidecar.manifest import Manifest, first_difference
from sidecar.manifest_check import Checked
from sidecar.memory import Memory, Placement

MUST_BE_EQUAL = (
    "weight_version",
    "tp_size",
    "pause_mode",
    "selector",
    "verify",
    "content_digest",
    "allow",
    "keep_cache",
    "group_name",
    "two_phase",
)
"""Of the headers of one update's ranks; their ids are, or it would be another update."""
LATE_S = 30.0
"""A rank that comes so soon after its peers' attempt was aborted, for the first time, was meant to be part of it."""


class UpdateState(IntEnum):
    """How far an update got; the numbers are the protocol's."""

    COLLECTING = 1
    APPLYING = 2
    COMMITTED = 3
    ABORTED = 4
    FAILED = 5

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to the update."""
        return self >= UpdateState.COMMITTED


class Phase(IntEnum):
    """The steps of an update; the numbers are the protocol's. In time, VERIFY and DECIDE come before PUBLISH."""

    COLLECT = 1
    PAUSE = 2
    BEGIN = 3
    LOAD = 4
    END = 5
    FLUSH = 6
    PUBLISH = 7
    RESUME = 8
    VERIFY = 9
    DECIDE = 10
    """All is ready, and the trainer's word to publish is waited for."""


class Transport(IntEnum):
    """How the bytes come to the engine; the numbers are the protocol's."""

    IPC = 1
    DISTRIBUTED = 2
    DISK = 3


class Verification(IntEnum):
    """What came of comparing checksums; the numbers are the protocol's."""

    NOT_ASKED = 0
    CONSISTENT = 1
    PROVEN = 2
    UNAVAILABLE = 3


class LoadPath(IntEnum):
    """Who has written the weights, from the fastest to the slowest; the numbers are the protocol's."""

    NOT_LOADED = 0
    REPLAYED = 1
    """The replay loader, from a recording."""
    STOCK = 2
    """The model's own load, as SGLang always does it."""
    PROVEN = 3
    """Both, and they were compared."""
    RECORDED = 4
    """The model's own load, observed."""
    FELL_BACK = 5
    """The model's own load, since it cannot be replayed."""


@dataclass(slots=True)
class Delivery:
    """What one rank has handed over so far."""

    handles: dict[int, Memory] = field(default_factory=dict)
    """By bucket."""
    committed: bool = False
    """Whether the rank said that this is all."""
    prepared: bool = False
    """Whether it has asked for the engine to be made ready."""
    published: bool = False
    """Whether it has said that the version is to be published."""
    owner: str = field(default_factory=CALLER.get)
    """Who brought it."""
    joined_at: float = field(default_factory=time.monotonic)
    """On the coordinator's clock."""


@dataclass(slots=True)
class Update:
    """One weight version on its way into the engine."""

    header: Header
    """The first rank's."""
    manifest: Manifest
    digest: str
    placement: Placement = Placement()  # noqa: RUF009 - frozen
    """Where the engine's ranks were when the update began: what memory each of them can open."""
    epoch: int = 0
    """The life of the engine that it is for."""
    ep_size: int = 1
    """Ranks that the engine's experts are spread over."""
    engine_tp_size: int = 0
    """The engine's own TP ranks, where they are not those that send; 0: they are."""
    model_path: str | None = None
    """For a disk update, whose manifest is empty: the folder that the engine loads."""
    checked: Checked | None = None
    """What its manifest was found to be like, if it was looked at."""
    started: float = 0.0
    """On the coordinator's clock."""
    state: UpdateState = UpdateState.COLLECTING
    deliveries: dict[int, Delivery] = field(default_factory=dict)
    """By rank, for ranks that joined."""
    num_posted: int = 0
    num_posted_before: int = 0
    """At its most, over earlier attempts under this id."""
    num_loaded: int = 0
    touched: bool = False
    """Whether the engine's weights may have been written."""
    patience_until: float = -inf
    """On the coordinator's clock: when the last of its callers' deadlines passes."""
    cache_flushed: bool = False
    verification: Verification = Verification.NOT_ASKED
    replays: bool = False
    """Whether its buckets go through the engine's replay loader; decided before the first."""
    load_path: LoadPath = LoadPath.NOT_LOADED
    """The slowest of all its buckets and ranks."""
    load_reason: str = ""
    """Why that was not a replay, where there is a replay loader."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of it, in sentences."""
    receiving: bool = False
    """Whether the engine has been made ready for the first bucket."""
    phase: Phase = Phase.COLLECT
    phase_since: float = inf
    """On the coordinator's clock: when that began."""
    phase_seconds: dict[Phase, float] = field(default_factory=dict)
    held_since: float = inf
    """On the coordinator's clock: when the engine was told to hold generation."""
    held_s: float | None = None
    """How long it did so for this update; None: it was not asked to, or holds it still."""
    ended_at: float = inf
    """On the coordinator's clock."""
    trace: str = ""
    """Of the first of its calls that brought one (``tracing``)."""
    told: set[int] = field(default_factory=set)
    """Ranks that came after it was aborted, and were told."""
    error: SyncError | None = None
    abort_request: SyncError | None = None
    """Why a rank wants it given up while it is being applied."""

    @property
    def id(self) -> str:
        """Its name, the same on all ranks."""
        return self.header.update_id

    @property
    def log_fields(self) -> dict[str, object]:
        """For ``logging``'s ``extra``."""
        return {"update_id": self.id, "version": self.header.weight_version}

    @property
    def num_buckets(self) -> int:
        """How many POSTs it takes."""
        return len(self.manifest.buckets)

    @property
    def num_engine_ranks(self) -> int:
        """How many TP ranks load it."""
        return self.engine_tp_size or self.header.tp_size

    @property
    def transport(self) -> Transport:
        """How its bytes come."""
        if self.model_path is not None:
            return Transport.DISK
        return Transport.DISTRIBUTED if self.header.group_name else Transport.IPC

    @property
    def may_be_tried_again(self) -> bool:
        """Whether its id may be used for the next attempt."""
        return self.state in (UpdateState.ABORTED, UpdateState.FAILED)

    def concerns(self, rank: int, now: float) -> bool:
        """Whether ``rank``, which comes now, was to be part of this aborted attempt, and does not know its end yet."""
        late = now - self.ended_at < LATE_S
        return self.state is UpdateState.ABORTED and late and rank not in self.deliveries and rank not in self.told

    def wait_until(self, moment: float) -> None:
        """A caller waits until ``moment``, on the coordinator's clock."""
        self.patience_until = max(self.patience_until, moment)

    def check_same(self, header: Header, manifest: Manifest, digest: str) -> None:
        """Raise ``UpdateConflict`` if another rank's call does not describe this same update."""
        first, rank = self.header, header.rank
        for name in MUST_BE_EQUAL:
            mine, theirs = getattr(first, name), getattr(header, name)
            if mine != theirs:
                raise self._ranks_differ(rank, f"{name} {_shown(mine)} against {_shown(theirs)}")
        if digest != self.digest:
            raise self._ranks_differ(rank, first_difference(self.manifest, manifest))

    def _ranks_differ(self, rank: int, difference: str) -> UpdateConflict:
        message = f"update {self.id!r}: ranks {self.header.rank} and {rank} differ: {difference}; "
        message += "every rank must send the same; the engine was not touched"
        return UpdateConflict(Reason.RANKS_DIFFER, message, updateId=self.id, ranks=f"{self.header.rank},{rank}")

    def join(self, rank: int) -> Delivery:
        """Take ``rank`` in; a repeated join changes nothing. Raises ``Forbidden`` for a rank of another client's."""
        self.check_owner(rank)
        return self.deliveries.setdefault(rank, Delivery())

    def check_owner(self, rank: int) -> None:
        """Raise ``Forbidden`` if another client, by its certificate, has spoken for ``rank``."""
        delivery, caller = self.deliveries.get(rank), CALLER.get()
        if delivery is not None and delivery.owner != caller:
            message = f"rank {rank} of update {self.id!r} belongs to another client than {caller or 'this one'!r}; "
            message += "every call for a rank must come with the same client certificate"
            raise Forbidden(Reason.NOT_YOURS, message, rank=rank, updateId=self.id)

    def deliver(self, rank: int, bucket: int, memory: Memory) -> None:
        """Take one rank's memory for one bucket; the same memory again changes nothing, other memory is refused."""
        handles = self.deliveries[rank].handles
        if handles.setdefault(bucket, memory) != memory:
            message = f"rank {rank} has already delivered bucket {bucket} of update {self.id!r}, from other memory; "
            message += "are two trainers running with the same rank?"
            raise RankAlreadyDelivered(Reason.RANK_DELIVERED_TWICE, message, rank=rank, bucket=bucket, updateId=self.id)

    def waiting_for(self, bucket: int) -> list[int]:
        """Ranks that have not delivered ``bucket``, in order; none past the last bucket.

        Over a group rank 0 alone sends, and all buckets come once it has said so.
        """
        if bucket >= self.num_buckets:
            return []
        if self.header.group_name:
            return [] if self._committed(0) else [0]
        return [rank for rank in range(self.header.tp_size) if bucket not in self._handles(rank)]

    def unready(self) -> list[int]:
        """Ranks that have neither delivered their first bucket nor asked for the engine to be made ready, in order."""
        return [rank for rank in range(self.header.tp_size) if not self._is_ready(rank)]

    def unpublished(self) -> list[int]:
        """Ranks whose word to publish is missing, in order; none where none is needed."""
        return [rank for rank in range(self.header.tp_size) if self.header.two_phase and not self._published(rank)]

    def uncommitted(self) -> list[int]:
        """Ranks that have not said that they are done, in order."""
        return [rank for rank in range(self.header.tp_size) if not self._committed(rank)]

    def spent(self, now: float) -> dict[Phase, float]:
        """Seconds in each phase so far, that of the present one included and last."""
        since = self.started if self.phase is Phase.COLLECT else self.phase_since
        if self.state.ended or self.phase in self.phase_seconds or since > now:
            return self.phase_seconds
        return self.phase_seconds | {self.phase: now - since}

    def missing(self) -> list[int]:
        """Ranks that the update waits for right now, whatever for."""
        if self.state.ended:
            return []
        if self.state is UpdateState.COLLECTING and self.model_path is None:
            return self.unready()
        if self.num_posted < self.num_buckets:
            return self.waiting_for(self.num_posted)
        return self.uncommitted() or (self.unpublished() if self.phase is Phase.DECIDE else [])

    def needs(self, rank: int) -> bool:
        """Whether the update does not get through without ``rank``, which has said all that it will say by now."""
        if rank in self.uncommitted() or rank in self.unpublished():
            return True
        if self.header.group_name:
            return rank == 0 and self.num_loaded < self.num_buckets
        return self.num_posted < self.num_buckets

    @property
    def complete(self) -> bool:
        """Whether nothing more is needed from any rank; over a group, the sender is until all is loaded."""
        if self.uncommitted() or self.unpublished():
            return False
        if self.header.group_name:
            return self.num_loaded == self.num_buckets
        return not any(self.waiting_for(b) for b in range(self.num_buckets))

    def memories(self, bucket: int) -> list[Memory]:
        """The handles of one bucket in rank order; every rank must have delivered it."""
        return [self.deliveries[rank].handles[bucket] for rank in range(self.header.tp_size)]

    def loaded_by(self, path: LoadPath, why: str = "") -> None:
        """One bucket was, on one rank or on all."""
        if path > self.load_path:
            self.load_path, self.load_reason = path, why

    def start_applying(self) -> None:
        """COLLECTING -> APPLYING: from here on only the applier decides."""
        assert self.state is UpdateState.COLLECTING
        assert self.model_path is not None or not self.unready()
        self.state = UpdateState.APPLYING

    def end(self, state: UpdateState, error: SyncError | None = None) -> None:
        """Into COMMITTED (without error), ABORTED or FAILED (with the reason)."""
        assert not self.state.ended
        assert state.ended
        assert (error is None) == (state is UpdateState.COMMITTED)
        self.state, self.error = state, error

    def _handles(self, rank: int) -> dict[int, Memory]:
        delivery = self.deliveries.get(rank)
        return delivery.handles if delivery else {}

    def _committed(self, rank: int) -> bool:
        delivery = self.deliveries.get(rank)
        return delivery.committed if delivery else False

    def _published(self, rank: int) -> bool:
        delivery = self.deliveries.get(rank)
        return delivery.published if delivery else False

    def _is_ready(self, rank: int) -> bool:
        delivery = self.deliveries.get(rank)
        return delivery is not None and (delivery.prepared or 0 in delivery.handles)


def _shown(value: object) -> str:
    """An allowance may hold a thousand patterns."""
    text = repr(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."
