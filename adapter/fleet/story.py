"""What a fleet's update comes to, over all its tries: every engine is in exactly one of the states of the result."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapter import wire
from adapter.errors import (
    IncompatibleSidecar,
    NotAllowed,
    UpdateAborted,
    UpdateFailed,
    UpdateRefused,
    UpdateStillApplying,
    WeightSyncError,
)
from adapter.fleet.attempt import Try
from adapter.fleet.member import Member
from adapter.fleet.result import EngineResult, EngineState
from sidecar.v1 import weight_sync_pb2 as pb

# In the words of gloo, NCCL and the sidecar: it was hit by another member's end, and may do better without that one.
# Not in SGLang's "partially updated", which it says of its own load as well.
HIT_BY_ANOTHER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL error",
    "aborted update",
    "was not published",
)


TOOK_NOTHING = (UpdateRefused, UpdateAborted, IncompatibleSidecar, NotAllowed)
DIED = ("ENGINE_LOST", "ENGINE_RESTARTED", "ENGINE_TIMEOUT")
"""Of an update that ended with its engine, or whose engine does not answer."""


@dataclass(slots=True)
class Story:
    """One update's."""

    failed: dict[Member, WeightSyncError]
    """At first: who was not there."""
    published: dict[Member, pb.UpdateOutcome] = field(default_factory=dict)
    untouched: set[Member] = field(default_factory=set)
    fenced: set[Member] = field(default_factory=set)
    attempts: int = 0
    decided: bool = False
    """Whether the version is published."""
    broke: str = ""
    """Why the last try's group broke, if it did."""
    seconds: dict[str, float] = field(default_factory=dict)
    _dirty: set[Member] = field(default_factory=set)
    """Whoever was left with half of it in some try: a later one that does not touch it does not make it clean."""
    _waited: dict[tuple[Member, str], float] = field(default_factory=dict)

    def add(self, one: Try) -> None:
        """Another try has ended."""
        self.attempts += 1
        self.decided |= one.decided
        self.broke = one.broke
        self.failed.update(one.failed)
        self.published.update(one.published)
        self._dirty |= {m for m, error in one.failed.items() if isinstance(error, UpdateFailed | UpdateStillApplying)}
        self._dirty -= one.published.keys()
        self.untouched |= one.untouched
        for member in self.published:
            self.failed.pop(member, None)
        self.untouched -= self.failed.keys() | self.published.keys()
        for step, seconds in one.seconds.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds
        for step, members in one.waited.items():
            for member, seconds in members.items():
                self._waited[member, step] = self._waited.get((member, step), 0.0) + seconds

    def lost(self, failed: Mapping[Member, WeightSyncError]) -> None:
        """Of those that would be tried again: who cannot be, and why. What a try said of its end is kept."""
        for member in self.untouched.intersection(failed):
            self.untouched.discard(member)
            self.failed[member] = failed[member]

    def worth_another_try(self, members: Iterable[Member]) -> list[Member]:
        """Of those that were tried: who has not got it, and was not the one to blame."""
        return [m for m in members if m in self.untouched or (m in self.failed and was_hit(self.failed[m]))]

    def state(self, member: Member) -> EngineState:
        """Where that engine stands."""
        if member in self.published:
            return EngineState.PUBLISHED
        if member in self._dirty:
            return EngineState.DIRTY
        error = self.failed.get(member)
        if error is None or (isinstance(error, TOOK_NOTHING) and error.reason not in DIED):
            return EngineState.UNTOUCHED
        return EngineState.UNREACHABLE

    def results(self) -> dict[str, EngineResult]:
        """Of all of them, by target."""
        members = [*self.published, *self.failed, *self.untouched]
        return {member.target: self._result(member) for member in sorted(members, key=lambda member: member.target)}

    def slowest(self) -> str:
        """Whom all others waited for longest, and in which step."""
        if not self._waited:
            return ""
        (member, step), seconds = max(self._waited.items(), key=lambda item: item[1])
        return f"{member.target} ({step}: {seconds:.3f} s)"

    def _result(self, member: Member) -> EngineResult:
        error, outcome = self.failed.get(member), self.published.get(member)
        return EngineResult(
            target=member.target,
            state=self.state(member),
            error=str(error) if error else "",
            fenced=member in self.fenced,
            update=wire.result(outcome) if outcome else None,
        )


def was_hit(error: WeightSyncError) -> bool:
    """Whether a member failed because another one did."""
    return isinstance(error, UpdateFailed | UpdateAborted) and any(words in str(error) for words in HIT_BY_ANOTHER)
