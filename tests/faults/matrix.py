"""The fault matrix as data: who fails, how and when, and what must come of it.

Pure. Most cells follow from a few rules, written here as functions; ``docs/faults.md`` is rendered from this module
and the tests play every cell. Invariant: each combination is there, with what is expected or with why it cannot be.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, IntEnum, StrEnum, auto


class Who(StrEnum):
    """Which process has the fault. Of two ranks it is rank 1; rank 0 is the bystander."""

    RANK = "rank"
    """A trainer's rank that pushes bucket by bucket, holds its update meanwhile, and commits."""
    ONE_CALL_RANK = "one-call-rank"
    """A trainer's rank that hands everything over in one call."""
    SIDECAR = "sidecar"
    ENGINE = "engine"


class What(StrEnum):
    """How it fails."""

    KILLED = "killed"
    """SIGKILL."""
    STOPPED = "stopped"
    """SIGSTOP, for longer than whoever waits for it has time; then SIGCONT."""
    SLOW = "slow"
    """SIGSTOP, for less than that."""
    CUT = "cut"
    """Its connection is cut; it can make another one at once."""
    LOST = "reply-lost"
    """A request arrives and is carried out, its answer does not arrive."""


class When(IntEnum):
    """Where the update is at that moment, in order."""

    COLLECT = auto()
    PAUSE = auto()
    BEGIN = auto()
    LOAD_FIRST = auto()
    """Bucket 0 of 2 is being loaded: its memory is open."""
    BETWEEN = auto()
    """Bucket 0 is loaded, and rank 1 has not delivered bucket 1."""
    LOAD_LAST = auto()
    """Bucket 1 of 2 is being loaded."""
    END = auto()
    FLUSH = auto()
    VERIFY = auto()
    PUBLISH = auto()
    RESUME = auto()

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


class Ending(Enum):
    """How a cell ends; a name for what is the same in many cells."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    DIRTY = "dirty"
    ENGINE_GONE = "engine gone"
    SUCCESSOR_READY = "successor ready"
    SUCCESSOR_DIRTY = "successor dirty"


class Visible(Enum):
    """Versions that answers carry from the fault until the cell is healed."""

    OLD = "old"
    OLD_THEN_NEW = "old, then new"


# How a rank's calls end: an ErrorInfo reason; or gRPC's own status, ">", and what it learned by asking again.
DEAD = "dead"
COMMITTED = "COMMITTED"
ABORTED = "UPDATE_ABORTED"
FAILED = "UPDATE_FAILED"
MISSING = "RANKS_MISSING"
UNREACHABLE = "ENGINE_UNREACHABLE"
UNKNOWN_FATE = "ENGINE_LOST"
CUT = "UNAVAILABLE"
LATE = "DEADLINE_EXCEEDED"
NOBODY = "NOBODY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What must come of a cell."""

    ending: Ending
    sees: tuple[str, str]
    """How the calls of rank 0 and rank 1 end; "|" between alternatives."""
    state: str = "READY"
    """Of the sidecar, or of its successor, before anything is healed; "|" between alternatives."""
    paused: bool = False
    """Whether generation is held before anything is healed."""
    visible: Visible = Visible.OLD
    note: str = ""
    """For a person, where the ending does not say it."""


@dataclass(frozen=True, slots=True)
class Impossible:
    """A cell that cannot be, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    who: Who
    what: What
    when: When
    expected: Expected | Impossible
    unopened: bool = False
    """Whether a bucket that is being loaded has not been opened by the engine yet."""

    def __str__(self) -> str:
        return f"{self.who}-{self.what}-{self.when}{'-unopened' if self.unopened else ''}"


def cells() -> Iterator[Cell]:
    """The whole matrix."""
    for who, what, when in itertools.product(Who, What, When):
        yield Cell(who, what, when, _expected(who, what, when))
        if what is What.KILLED and who in (Who.RANK, Who.ONE_CALL_RANK) and when in (When.LOAD_FIRST, When.LOAD_LAST):
            yield Cell(who, what, when, _killed_with_unopened_memory(), unopened=True)


def _expected(who: Who, what: What, when: When) -> Expected | Impossible:
    match who:
        case Who.SIDECAR:
            return _of_the_sidecar(what, when)
        case Who.ENGINE:
            return _of_the_engine(what, when)
        case _:
            return _of_a_rank(who, what, when)


def _committed(bystander: str = COMMITTED, other: str = COMMITTED, note: str = "") -> Expected:
    sees = (bystander, other)
    return Expected(ending=Ending.COMMITTED, sees=sees, visible=Visible.OLD_THEN_NEW, note=note)


def _aborted(bystander: str, other: str, note: str = "") -> Expected:
    return Expected(ending=Ending.ABORTED, sees=(bystander, other), note=note)


def _dirty(bystander: str = FAILED, other: str = FAILED, note: str = "") -> Expected:
    return Expected(ending=Ending.DIRTY, sees=(bystander, other), state="DIRTY", paused=True, note=note)


# A trainer's rank: it matters until its part is done, which is all memory posted, and for buckets also a commit.


def _of_a_rank(who: Who, what: What, when: When) -> Expected | Impossible:
    one_call = who is Who.ONE_CALL_RANK
    if one_call and when is When.BETWEEN:
        return Impossible("in one call all memory is there before the first POST: the engine waits for no bucket")
    match what:
        case What.SLOW:
            return _committed(note="it is waited for")
        case What.LOST:
            return _committed(other=f"{LATE}>{COMMITTED}")
        case What.STOPPED:
            return _stopped_rank(when, one_call)
        case _:
            return _broken_rank(what, when, one_call)


def _stopped_rank(when: When, one_call: bool) -> Expected:
    if when is When.COLLECT:
        return _aborted(MISSING, MISSING, "at `--collect-timeout`, or at the callers' deadline")
    if one_call or when > When.LOAD_LAST:
        return _committed(note="its memory is there, and its process need not run")
    return _dirty(note="at `--bucket-timeout`: it neither pushes nor commits")


def _broken_rank(what: What, when: When, one_call: bool) -> Expected:
    if when > When.LOAD_LAST or (when is When.LOAD_LAST and one_call):
        return _committed(other=_gone(what, COMMITTED))
    if when > When.BEGIN:
        # Between buckets no call of the rank is open but HoldUpdate: its next push hears of it.
        pushes = what is What.CUT and when is When.BETWEEN
        return _dirty(other=FAILED if pushes else _gone(what, "FAILED"))
    if one_call and when is When.COLLECT:
        return _aborted(ABORTED, _gone(what, "ABORTED"), "ranks that call soon after are told at once")
    return _aborted(ABORTED, _gone(what, "ABORTED"))


def _killed_with_unopened_memory() -> Expected:
    """SGLang dies of memory that is not there; the window is that of a POST on its way."""
    note = (
        "SGLang dies of memory that has gone with its owner; a host's file stays while the engine knows torch's helper"
    )
    gone = _killed_engine(When.LOAD_FIRST)
    return replace(gone, sees=(gone.sees[0], DEAD), note=note)


def _gone(what: What, learned: str) -> str:
    return DEAD if what is What.KILLED else f"{CUT}>{learned}"


# The sidecar: its death is many broken connections at once, and what it knew is in the journal.


def _of_the_sidecar(what: What, when: When) -> Expected | Impossible:
    match what:
        case What.SLOW:
            return _committed()
        case What.LOST:
            return _committed(f"{LATE}>{COMMITTED}", f"{LATE}>{COMMITTED}")
        case What.KILLED:
            return _killed_sidecar(when)
        case What.STOPPED:
            return _stopped_sidecar(when)
        case What.CUT:
            return _cut_off_sidecar(when)


def _killed_sidecar(when: When) -> Expected:
    sees = (f"{CUT}>{NOBODY}", f"{CUT}>{NOBODY}")
    if when <= When.BEGIN:
        return Expected(ending=Ending.SUCCESSOR_READY, sees=sees)
    dirty = Expected(ending=Ending.SUCCESSOR_DIRTY, sees=sees, state="DIRTY", paused=True)
    if when is not When.RESUME:
        return dirty
    note = "the engine has had the last request: it goes on, with all of the new version, until the successor holds it"
    return replace(dirty, visible=Visible.OLD_THEN_NEW, note=note)


def _stopped_sidecar(when: When) -> Expected:
    """The engine answers meanwhile. Callers whose deadline passes ask again, and it takes up where it was."""
    late = f"{LATE}>{COMMITTED}"
    if when is When.COLLECT:
        return _aborted(f"{LATE}>ABORTED", f"{MISSING}|{ABORTED}")
    if when is When.PAUSE:
        return _aborted(f"{LATE}>ABORTED", f"{LATE}>ABORTED", "no caller has the time left to begin")
    return _committed(late, COMMITTED if when is When.BETWEEN else late, "for callers that ask again")


def _cut_off_sidecar(when: When) -> Expected:
    """All callers are gone at once, and come back."""
    if when > When.LOAD_LAST:
        return _committed(f"{CUT}>{COMMITTED}", f"{CUT}>{COMMITTED}")
    if when is When.COLLECT:
        return _aborted(f"{CUT}>ABORTED", ABORTED)
    if when <= When.BEGIN:
        return _aborted(f"{CUT}>ABORTED", f"{CUT}>ABORTED")
    return _dirty(f"{CUT}>FAILED", FAILED if when is When.BETWEEN else f"{CUT}>FAILED")


# The engine: what becomes of a lost call is found out, and a server that died leaves nothing dirty behind.

LOOKS = "nothing but a look (`/model_info`) is on its way then; it is made again"
QUEUED_RESUME = "once it goes on it resumes: that had been asked of it too, and its weights are of one version"


def _of_the_engine(what: What, when: When) -> Expected | Impossible:
    match what:
        case What.SLOW:
            return _committed()
        case What.KILLED:
            return _killed_engine(when)
        case What.STOPPED:
            return _stopped_engine(when)
        case _ if when in (When.COLLECT, When.BETWEEN):
            return _committed(note=LOOKS)
        case What.CUT:
            return _cut_engine(when)
        case What.LOST:
            return _lost_reply(when)


def _killed_engine(when: When) -> Expected:
    """A connection that breaks, or one that is refused: which of the two is seen depends on the moment."""
    reason = UNREACHABLE if when in (When.COLLECT, When.BETWEEN) else f"{UNKNOWN_FATE}|{UNREACHABLE}"
    return Expected(
        ending=Ending.ENGINE_GONE,
        sees=(reason, reason),
        state="ENGINE_UNREACHABLE|UNSYNCED",
        visible=Visible.OLD_THEN_NEW if when is When.RESUME else Visible.OLD,
    )


def _stopped_engine(when: When) -> Expected:
    """It goes on once the update has ended, and then deals with what has queued up."""
    if when <= When.PAUSE:
        return replace(_dirty(note=QUEUED_RESUME), paused=False)
    if when is When.RESUME:
        return replace(_dirty(note=QUEUED_RESUME), paused=False, visible=Visible.OLD_THEN_NEW)
    return _dirty()


def _cut_engine(when: When) -> Expected:
    """The request was not carried out."""
    if when in (When.PAUSE, When.BEGIN):
        return _aborted(UNKNOWN_FATE, UNKNOWN_FATE)
    if when in (When.LOAD_FIRST, When.LOAD_LAST, When.END):
        return _dirty()
    return _committed(note="it is asked again")


def _lost_reply(when: When) -> Expected:
    """The request was carried out."""
    if when is When.PAUSE:
        return _aborted(UNKNOWN_FATE, UNKNOWN_FATE)
    if when in (When.BEGIN, When.END):
        return _committed(note="found out by the session probe")
    if when in (When.LOAD_FIRST, When.LOAD_LAST):
        return _committed(note="found out by the reference counts of the memory")
    return _committed(note="found out, or asked again")
