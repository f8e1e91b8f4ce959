"""One engine of a fleet, through its sidecar; and one question put to many of them at once.

Invariant: every call has a deadline, and a member that fails is an entry in the answer, never an exception that hides
what the others said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import grpc

from adapter import traces
from adapter.credentials import Credentials
from adapter.errors import SidecarUnreachable, WeightSyncError, from_rpc_error
from adapter.sidecar_stub import SidecarStub
from sidecar.v1 import weight_sync_pb2 as pb

A = TypeVar("A")
AT_LEAST_S = 0.001


class Member:
    """One sidecar and its engine."""

    def __init__(self, target: str, credentials: Credentials) -> None:
        self.target = target
        self.stub = SidecarStub(target, credentials)
        self.engine = pb.EngineInfo()
        """As of the last look."""
        self.group_name = ""
        """Of the group that the engine is in, as of the last look."""
        self.knows: set[str] = set()
        """Digests of manifests that its sidecar has taken."""

    @property
    def life(self) -> tuple[str, int, str]:
        """Which life of which engine this is, as far as it is known: a group is of one."""
        return self.target, self.engine.epoch, self.engine.version

    def close(self) -> None:
        """Close the channel."""
        self.stub.close()


@dataclass(slots=True)
class Answers(Generic[A]):
    """What each member said, and how long it took."""

    good: dict[Member, A] = field(default_factory=dict)
    failed: dict[Member, WeightSyncError] = field(default_factory=dict)
    seconds: dict[Member, float] = field(default_factory=dict)


class Asking(Generic[A]):
    """Calls to many members that are under way."""

    def __init__(self, calls: Mapping[Member, grpc.Future[A]]) -> None:
        self._calls = dict(calls)
        self._started = time.monotonic()
        self._ended: dict[Member, float] = {}
        for member, call in self._calls.items():
            call.add_done_callback(partial(self._note, member))

    def _note(self, member: Member, _: object) -> None:
        self._ended.setdefault(member, time.monotonic())

    def failures(self) -> dict[Member, WeightSyncError]:
        """Of those that have ended by now."""
        return {
            member: error
            for member, call in self._calls.items()
            if call.done() and (error := _error(member, call)) is not None
        }

    def over(self) -> bool:
        """Whether all have ended by now."""
        return all(call.done() for call in self._calls.values())

    def answers(self, within_s: float | None = None) -> Answers[A]:
        """Wait for all: each has its deadline, and those that are open after ``within_s`` are ended."""
        found: Answers[A] = Answers()
        give_up = None if within_s is None else time.monotonic() + within_s
        for member, call in self._calls.items():
            if give_up is not None and not _is_done(call, give_up):
                call.cancel()
            error = _error(member, call)
            if error is None:
                found.good[member] = call.result()
            else:
                found.failed[member] = error
            found.seconds[member] = self._ended.get(member, time.monotonic()) - self._started
        return found

    def cancel(self) -> None:
        """End those that are open."""
        for call in self._calls.values():
            call.cancel()


def ask(members: Iterable[Member], start: Callable[[Member], grpc.Future[A]]) -> Asking[A]:
    """Begin one call to each."""
    return Asking({member: start(member) for member in members})


def metadata() -> tuple[tuple[str, str | bytes], ...]:
    """That every call carries: the trainer's trace."""
    return traces.metadata()


def left(give_up: float) -> float:
    """Seconds until then, as a call's time-out."""
    return max(AT_LEAST_S, give_up - time.monotonic())


def _is_done(call: grpc.Future[A], give_up: float) -> bool:
    """Whether it is by then."""
    with suppress(grpc.FutureTimeoutError, grpc.FutureCancelledError):
        call.exception(timeout=left(give_up))
    return call.done()


def _error(member: Member, call: grpc.Future[A]) -> WeightSyncError | None:
    try:
        failure = call.exception()
    except grpc.FutureCancelledError:
        return SidecarUnreachable(f"the sidecar at {member.target} did not answer in time")
    if failure is None:
        return None
    assert isinstance(failure, grpc.RpcError)
    return from_rpc_error(failure, member.target)
