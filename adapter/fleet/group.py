"""One torch.distributed group of this process and every rank of every member's engine.

    build: serve the store -> every sidecar has its engine join, and this process joins -> all are in, or the group is
           closed and those that did join are told to leave
    a group serves many updates; after anything that broke, or once the members or their lives are others, it is closed
    and a new one is built, under a new name: SGLang waits for ever in one that is not whole

Invariant: rank 0 is this process; member i's engine has the ranks from its offset on, in the order of its TP ranks.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import grpc
import torch

from adapter.errors import GroupBroken, IncompatibleSidecar, NotAllowed, SidecarUnreachable, WeightSyncError
from adapter.fleet.member import Asking, Member, ask, left, metadata
from adapter.process_group import BroadcastGroup
from sidecar.v1 import weight_sync_pb2 as pb

POLL_S = 0.005
LEAVE_S = 5.0
ANSWER_S = 3.0
"""For an engine to say that a group which it waits for has been closed."""
NOT_ANSWERED = ("", "ENGINE_TIMEOUT", "ENGINE_LOST")
LATE_S = 60.0
"""How long after its call has ended an engine may come to join: it answers requests first."""
AS_IF_WAITING = ("ENGINE_REFUSED", "UPDATE_IN_PROGRESS", "GROUP_UNREACHABLE")
DISCARD_PORT = 9
NCCL, GLOO = "nccl", "gloo"

Joining: TypeAlias = "grpc.Future[pb.InitWeightsUpdateGroupResponse]"
Failures: TypeAlias = dict[Member, WeightSyncError]


class Sending(Protocol):
    """A broadcast under way: ``adapter.process_group.Sent``."""

    def done(self) -> bool:
        """Whether every receiver has it, or it failed."""

    def check(self) -> None:
        """Raise ``GroupBroken`` if it failed; called once it is done."""


class Group(Protocol):
    """The data's way: ``BroadcastGroup``, or in a test of the control's cost nothing at all."""

    name: str
    port: int
    backend: str

    def join(self) -> None:
        """Return once all members have joined; raises ``GroupBroken``."""

    def broadcast(self, flat: torch.Tensor) -> Sending:
        """Begin to send."""

    def close(self) -> None:
        """Close every connection."""

    def turn_away(self, over: Callable[[], bool], seconds: float) -> None:
        """Tell whoever still comes to join that the group is closed, until ``over`` or for ``seconds``."""


MakeGroup = Callable[[str, int, str, float, float], Group]
"""Name, world size, backend, seconds to join in and seconds for one broadcast -> a group that is not joined yet."""


class NotJoined(WeightSyncError):
    """A group was not built; ``failed`` says who stood in the way, as far as it is known."""

    def __init__(self, message: str, failed: dict[Member, WeightSyncError]) -> None:
        super().__init__(message)
        self.failed = failed


class FleetGroup:
    """The present group, if there is one."""

    def __init__(self, address: str | None, join_timeout_s: float, timeout_s: float, make: MakeGroup | None) -> None:
        """``address``: where engines reach this host; None: as the way to the first of them shows."""
        self._address = address
        self._join_timeout_s = join_timeout_s
        self._timeout_s = timeout_s
        self._make = make or BroadcastGroup
        self._group: Group | None = None
        self._members: list[Member] = []
        self._lives: list[tuple[str, int, str]] = []

    def for_members(self, members: Sequence[Member], device: torch.device, give_up: float) -> Group:
        """The group of exactly these lives; raises ``NotJoined``."""
        backend = _backend(members, device)
        lives = [member.life for member in members]
        group = self._group
        if group is not None and (self._lives, group.backend) == (lives, backend) and _are_in(group, members):
            return group
        self.leave()
        group = self._group = self._built(members, backend, give_up)
        self._members, self._lives = list(members), lives
        return group

    def drop(self) -> None:
        """Something broke: close it; the sidecars have left, or do so when they hear of it."""
        group, self._group, self._lives = self._group, None, []
        if group is not None:
            group.close()

    def leave(self) -> None:
        """Close it in order: every engine is told to leave first."""
        if self._group is not None:
            _leave(self._members, self._group.name)
        self.drop()

    def _built(self, members: Sequence[Member], backend: str, give_up: float) -> Group:
        seconds = min(self._join_timeout_s, left(give_up))
        world_size = 1 + sum(member.engine.tp_size for member in members)
        address = self._address or address_towards(members[0].target)
        name = f"weight-sync-{secrets.token_hex(8)}"
        group = self._make(name, world_size, backend, seconds, self._timeout_s)
        asking = ask(members, _joining(members, group, address, world_size, seconds))
        patience_s = max(seconds - ANSWER_S, seconds / 2)  # so that there is time to tell who waited from who hangs
        try:
            broken = _join(group, asking, time.monotonic() + patience_s)
        except BaseException:  # Ctrl-C
            _give_up(group, asking, seconds)
            raise
        first = asking.failures()
        if broken is None and not asking.answers().failed:
            return group
        _give_up(group, asking, seconds)  # ends what engines wait for: those that hang otherwise say nothing still
        failed = asking.answers().failed
        _leave(members, name)
        blamed = to_blame(failed, first)
        raise NotJoined(f"group {name} was not joined by all: {_first(blamed) or broken}", blamed)


def _are_in(group: Group, members: Sequence[Member]) -> bool:
    """A sidecar that was restarted knows of no group, whatever its engine is in."""
    return all(member.group_name == group.name for member in members)


def _joining(
    members: Sequence[Member], group: Group, address: str, world_size: int, seconds: float
) -> Callable[[Member], Joining]:
    offsets, offset = {}, 1
    for member in members:
        offsets[member] = offset
        offset += member.engine.tp_size

    def start(member: Member) -> Joining:
        message = pb.WeightsUpdateGroup(
            group_name=group.name,
            master_address=address,
            master_port=group.port,
            rank_offset=offsets[member],
            world_size=world_size,
            backend=group.backend,
        )
        request = pb.InitWeightsUpdateGroupRequest(group=message)
        return member.stub.rpc.InitWeightsUpdateGroup.future(request, timeout=seconds, metadata=metadata())

    return start


def _join(group: Group, asking: Asking[pb.InitWeightsUpdateGroupResponse], give_up: float) -> WeightSyncError | None:
    """This process's own part; what stood in its way. A wait for a member that failed is left to its time-out."""
    problem: list[WeightSyncError] = []

    def join() -> None:
        try:
            group.join()
        except WeightSyncError as error:
            problem.append(error)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: it must not pass for one that has joined
            problem.append(GroupBroken(f"this process cannot join a group: {error!r}"))

    joining = threading.Thread(target=join, name=f"join {group.name}", daemon=True)
    joining.start()
    while joining.is_alive():
        failed = asking.failures()
        if failed:
            return next(iter(failed.values()))
        if time.monotonic() > give_up:
            return GroupBroken("not all members joined in time")
        joining.join(POLL_S)
    return problem[0] if problem else None


def _give_up(group: Group, asking: Asking[pb.InitWeightsUpdateGroupResponse], seconds: float) -> None:
    """A member that has not come yet would look for the store until its own time is over."""
    group.close()
    group.turn_away(lambda: not _may_come(asking), seconds + LATE_S)


def _may_come(asking: Asking[pb.InitWeightsUpdateGroupResponse]) -> bool:
    """Whether some engine may still be on its way: nobody has said what became of it, or that it was never asked."""
    return not asking.over() or any(may_come(error) for error in asking.failures().values())


def may_come(error: WeightSyncError) -> bool:
    """Whether the engine of whoever failed so may have been told of the group, and has not answered."""
    if isinstance(error, SidecarUnreachable):
        return not error.took_nothing
    never_asked = isinstance(error, IncompatibleSidecar | NotAllowed)
    return not never_asked and error.reason in NOT_ANSWERED


def _leave(members: Sequence[Member], name: str) -> None:
    """Whoever cannot be told has left, or will when its engine is."""
    request = pb.DestroyWeightsUpdateGroupRequest(group_name=name)
    ask(members, lambda m: m.stub.rpc.DestroyWeightsUpdateGroup.future(request, timeout=LEAVE_S)).answers()


def _backend(members: Sequence[Member], device: torch.device) -> str:
    on_gpus = device.type == "cuda" and all(member.engine.device == "cuda" for member in members)
    return NCCL if on_gpus else GLOO


def to_blame(failed: Failures, first: Failures) -> Failures:
    """Without those that only waited for another one; ``first``: who had failed before the group was closed.

    Whoever waits is refused by its engine once the group is closed. So of those that all seem to have waited, the first
    was not let in for a reason of its own; and where none was first, whoever says nothing hangs.
    """
    own = {
        member: error for member, error in failed.items() if not (_is_silent(error) or error.reason in AS_IF_WAITING)
    }
    own_at_first = {member: error for member, error in first.items() if member in own}
    silent = {member: error for member, error in failed.items() if _is_silent(error)}
    return own_at_first or own or first or silent or failed


def _is_silent(error: WeightSyncError) -> bool:
    return error.reason == "ENGINE_TIMEOUT" or (type(error) is WeightSyncError and not error.reason)  # its deadline


def _first(failed: dict[Member, WeightSyncError]) -> str:
    return "; ".join(f"{member.target}: {error}" for member, error in list(failed.items())[:3])


def address_towards(target: str) -> str:
    """This host's address on the way to a sidecar, which is taken for the way to its engine."""
    host, _, _ = target.rpartition(":")
    if target.startswith("unix:") or not host:
        return "127.0.0.1"
    try:
        found = socket.getaddrinfo(host.strip("[]"), DISCARD_PORT, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as way:
            way.connect(address)  # of a datagram socket: nothing is sent
            return str(way.getsockname()[0])
    except OSError as error:
        raise ValueError(f"{target} shows no way to its host ({error}): say Fleet(address=...), of this one") from error
