"""One try to bring one version into all members of a group, in two phases.

    begin -> prepare -> commit, while this process broadcasts -> decide -> publish
      |         |                  |                               |
      +---------+-> abort          +-> group dropped, abort        +-> too few: abort

begin and prepare leave every engine untouched, and a member that fails there keeps the others from going on with a
group that would wait for it: they are let go, and the caller tries again without it. From the first broadcast on a
member that breaks takes the group with it. Invariants: the version is published only after the policy's number of
members hold all of it, flushed; a member that holds it and must not publish it is aborted, which leaves it paused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import grpc

from adapter import wire
from adapter.bucketed import in_words
from adapter.errors import GroupBroken, UpdateAborted, UpdateFailed, UpdateStillApplying, WeightSyncError
from adapter.filled import FilledBuckets, Region
from adapter.fleet.group import Group, Sending
from adapter.fleet.member import Answers, Asking, Member, ask, left, metadata
from adapter.known_manifest import MANIFEST_UNKNOWN
from adapter.planner import Plan
from adapter.process_group import POLL_S
from adapter.recent import Recent
from sidecar.v1 import weight_sync_pb2 as pb

A = TypeVar("A")
ABORT_S = 10.0
ANSWER_S = 2.0
PUBLISH_S = 60.0
UNHEARD_S = 5.0
LOOK_EVERY_S = 0.05
MAX_REASON = 500
MAX_NAMED = 5


@dataclass(slots=True)
class Try:
    """What came of one attempt."""

    published: dict[Member, pb.UpdateOutcome] = field(default_factory=dict)
    failed: dict[Member, WeightSyncError] = field(default_factory=dict)
    """Whose own fault, or whose link's, the attempt's end was, and whoever was hit by it."""
    untouched: set[Member] = field(default_factory=set)
    """That were let go with what they served before."""
    broke: str = ""
    """Why the group cannot be used again."""
    seconds: dict[str, float] = field(default_factory=dict)
    waited: dict[str, dict[Member, float]] = field(default_factory=dict)
    """By step: how long each member took."""

    @property
    def decided(self) -> bool:
        """Whether enough held it and it is published, whatever became of single members then."""
        return bool(self.published)


class Attempt:
    """One update id at all members."""

    def __init__(
        self,
        members: Iterable[Member],
        group: Group,
        header: pb.UpdateHeader,
        plan: Plan,
        digests: Recent[Plan, str],
        *,
        needed: int,
        patience_s: float,
        load_s: float,
        give_up: float,
    ) -> None:
        """Of one update id.

        ``needed``: how many members must hold it ready. ``patience_s``: for one to begin, and to make ready.
        ``load_s``: for one to load what it has received. ``give_up``: on the monotonic clock.
        """
        self._members = list(members)
        self._group = group
        self._header = header
        self._plan = plan
        self._digests = digests
        self._needed = needed
        self._patience_s = patience_s
        self._load_s = load_s
        self._give_up = give_up
        self._openings: dict[str | None, pb.BeginUpdateRequest] = {}
        """By digest; None: in full."""
        self._try = Try()

    def run(self, fill: Callable[[], FilledBuckets[Region]]) -> Try:
        """Do all of it. Raises what ``fill`` and the buckets raise; then nothing was published."""
        with ExitStack() as held:
            with self._step("begin"):
                begun = self._begin()
                held.callback(self._hold(begun.good, left(self._give_up) + PUBLISH_S).cancel)
            if not self._all_are_there(begun, begun.good):
                return self._try
            with self._step("prepare"):
                prepared = self._noted("prepare", ask(begun.good, self._preparing))
            if not self._all_are_there(prepared, begun.good):
                return self._try
            with self._step("broadcast"):
                ready = self._broadcast(fill)
            with self._step("publish"):
                self._decide(ready)
        return self._try

    # Before anything is written.

    def _begin(self) -> Answers[pb.BeginUpdateResponse]:
        """By digest where the sidecar knows the manifest."""
        answers = self._noted("begin", ask(self._members, self._beginning))
        forgotten = [member for member, error in answers.failed.items() if error.reason == MANIFEST_UNKNOWN]
        if forgotten:
            for member in forgotten:
                member.knows.clear()
                del answers.failed[member]
            again = self._noted("begin", ask(forgotten, self._beginning))
            answers.good.update(again.good)
            answers.failed.update(again.failed)
        for member, answer in answers.good.items():
            member.knows.add(answer.manifest_digest)
            self._digests.put(self._plan, answer.manifest_digest)
        return answers

    def _beginning(self, member: Member) -> grpc.Future[pb.BeginUpdateResponse]:
        request = self._opening(member)
        return member.stub.rpc.BeginUpdate.future(request, timeout=self._step_s(), metadata=metadata())

    def _opening(self, member: Member) -> pb.BeginUpdateRequest:
        """One message for all members that know as much: a manifest in full is long, and not copied for each."""
        digest = self._digests.find(self._plan)
        known = digest if digest in member.knows else None
        if known not in self._openings:
            reference = pb.ManifestReference(digest=known) if known else self._in_full()
            self._openings[known] = pb.BeginUpdateRequest(update=self._header, manifest=reference)
        return self._openings[known]

    def _in_full(self) -> pb.ManifestReference:
        return pb.ManifestReference(manifest=wire.manifest(self._plan))

    def _preparing(self, member: Member) -> grpc.Future[pb.PrepareUpdateResponse]:
        request = pb.PrepareUpdateRequest(update_id=self._header.update_id)
        return member.stub.rpc.PrepareUpdate.future(request, timeout=self._step_s(), metadata=metadata())

    def _step_s(self) -> float:
        """A member that is late holds up all others, whose generation may be paused by now."""
        return min(self._patience_s, left(self._give_up))

    def _all_are_there(self, answers: Answers[A], begun: Iterable[Member]) -> bool:
        """A group with a member that does not receive would never get through: the others are let go."""
        if not answers.failed:
            return True
        self._try.failed.update(answers.failed)
        why = f"{_named(answers.failed)} did not take part"
        ended = self._abort({*begun, *answers.failed}, why).good  # an answer may only be late, or lost
        for member, error in answers.failed.items():
            if isinstance(error, UpdateStillApplying) and member in ended and _is_untouched(ended[member].outcome):
                self._try.failed[member] = UpdateAborted(f"it was not ready in time: {ended[member].outcome.error}")
        self._try.untouched.update(member for member in begun if member not in answers.failed)
        return False

    # The weights.

    def _broadcast(self, fill: Callable[[], FilledBuckets[Region]]) -> Answers[pb.CommitUpdateResponse]:
        """Commits are sent before the bytes: each says that they come, and is answered when the engine has all."""
        committing = ask(self._members, self._committing)
        try:
            self._send_all(fill(), committing)
        except BaseException as error:
            self._try.broke = in_words(error)
            self._group.close()  # whoever waits for bytes is told by its connection
            self._abort(self._members, in_words(error))
            if not isinstance(error, WeightSyncError):
                committing.cancel()
                raise
            return self._none_of_them(committing)
        return self._noted("load", committing, within_s=self._load_s)

    def _none_of_them(self, committing: Asking[pb.CommitUpdateResponse]) -> Answers[pb.CommitUpdateResponse]:
        """After a broadcast that broke nobody is ready: who had all of it was aborted like the rest."""
        answers = self._noted("load", committing, within_s=ANSWER_S)  # those that could not be told say no more
        unpublished = UpdateFailed(f"it holds the update, which was not published: {self._try.broke}")
        answers.failed.update(dict.fromkeys(answers.good, unpublished))
        answers.good.clear()
        return answers

    def _committing(self, member: Member) -> grpc.Future[pb.CommitUpdateResponse]:
        request = pb.CommitUpdateRequest(update_id=self._header.update_id)
        return member.stub.rpc.CommitUpdate.future(request, timeout=left(self._give_up), metadata=metadata())

    def _send_all(self, buckets: FilledBuckets[Region], committing: Asking[pb.CommitUpdateResponse]) -> None:
        in_flight: deque[Sending] = deque()
        for number, bucket in enumerate(self._plan.buckets):
            if len(in_flight) == buckets.depth:
                self._finish(in_flight.popleft(), committing)
            flat = buckets.fill(number).flat[: bucket.num_bytes]
            in_flight.append(self._group.broadcast(flat))
        while in_flight:
            self._finish(in_flight.popleft(), committing)
        buckets.expect_end()
        buckets.check_sources()

    def _finish(self, sent: Sending, committing: Asking[pb.CommitUpdateResponse]) -> None:
        looked = began = time.monotonic()
        while not sent.done():
            now = time.monotonic()
            if now > min(self._give_up, began + self._load_s):
                raise GroupBroken(f"a broadcast was not received by all within {now - began:.1f} s")
            if now - looked > LOOK_EVERY_S:
                looked = now
                for member, error in committing.failures().items():
                    raise GroupBroken(f"{member.target} receives no more: {error}")
            time.sleep(POLL_S)
        sent.check()

    # Publishing.

    def _decide(self, ready: Answers[pb.CommitUpdateResponse]) -> None:
        self._try.failed.update(ready.failed)
        if len(ready.good) < self._needed:
            self._abort(ready.good, f"only {len(ready.good)} of {self._needed} engines hold it")
            unpublished = f"it holds the update, which was not published: {_named(ready.failed)} failed"
            self._try.failed.update({member: UpdateFailed(unpublished) for member in ready.good})
            return
        published = self._noted("publish", ask(ready.good, self._publishing))
        self._try.published = {member: answer.outcome for member, answer in published.good.items()}
        self._try.failed.update(published.failed)
        for member, outcome in self._unheard(published.failed).items():
            if failure := wire.failure(outcome):
                self._try.failed[member] = failure
            else:
                self._try.published[member] = outcome
                del self._try.failed[member]

    def _unheard(self, failed: Mapping[Member, WeightSyncError]) -> dict[Member, pb.UpdateOutcome]:
        """How it ended where the answer was lost on its way: most have published it all the same."""
        lost = [member for member, why in failed.items() if not why.reason]  # not the sidecar's own words
        ended = self._hold(lost, UNHEARD_S, reconnect=True).answers().good
        return {member: answer.outcome for member, answer in ended.items()}

    def _publishing(self, member: Member) -> grpc.Future[pb.PublishUpdateResponse]:
        # Decided is decided: the time for the update does not count any more.
        request = pb.PublishUpdateRequest(update_id=self._header.update_id)
        seconds = max(PUBLISH_S, left(self._give_up))
        return member.stub.rpc.PublishUpdate.future(request, timeout=seconds, metadata=metadata())

    def _abort(self, members: Iterable[Member], why: str) -> Answers[pb.AbortUpdateResponse]:
        """Whoever cannot be told, or has ended by itself, needs no more."""
        request = pb.AbortUpdateRequest(update_id=self._header.update_id, reason=why[:MAX_REASON])
        return ask(members, lambda member: member.stub.rpc.AbortUpdate.future(request, timeout=ABORT_S)).answers()

    def _hold(
        self, members: Iterable[Member], seconds: float, *, reconnect: bool = False
    ) -> Asking[pb.HoldUpdateResponse]:
        """Calls that stay open until the update has ended: the sidecars notice the death of this process at once.

        ``reconnect``: waits for a sidecar that cannot be reached just now.
        """
        request = pb.HoldUpdateRequest(update_id=self._header.update_id)
        return ask(members, lambda m: m.stub.rpc.HoldUpdate.future(request, timeout=seconds, wait_for_ready=reconnect))

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._try.seconds[name] = time.monotonic() - started

    def _noted(self, step: str, asking: Asking[A], within_s: float | None = None) -> Answers[A]:
        answers = asking.answers(within_s)
        waited = self._try.waited.setdefault(step, {})
        for member, seconds in answers.seconds.items():
            waited[member] = waited.get(member, 0.0) + seconds
        return answers


def _is_untouched(outcome: pb.UpdateOutcome) -> bool:
    return outcome.state == pb.UPDATE_STATE_ABORTED


def _named(failed: Iterable[Member]) -> str:
    targets = [member.target for member in failed]
    shown = ", ".join(targets[:MAX_NAMED])
    return shown + (f" and {len(targets) - MAX_NAMED} more" if len(targets) > MAX_NAMED else "")
