"""One call that brings a version into many engines, each with a sidecar of its own, over one broadcast.

Runs in the trainer's rank 0, in its own thread; the other ranks of a trainer with shards call ``take_part``. Invariant:
no engine serves a version that the fleet has not published, and of every engine that does not serve the one it has, the
result, and whoever listens (``on_fenced``), is told.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
import torch

from adapter import wire
from adapter.bucketed import take_part
from adapter.checks import refuse_forked_cuda
from adapter.credentials import NO_CREDENTIALS, Credentials
from adapter.errors import EngineUnreachable, SidecarUnreachable, UpdateRefused, WeightSyncError
from adapter.fleet.attempt import Attempt, Try
from adapter.fleet.discovery import Discovery, Listed
from adapter.fleet.filling import Filling
from adapter.fleet.group import FleetGroup, MakeGroup, NotJoined
from adapter.fleet.member import Answers, Member, ask
from adapter.fleet.policy import ALL_OR_NOTHING, BEST_EFFORT, Policy
from adapter.fleet.regions import PlainRegions
from adapter.fleet.result import EngineResult, EngineState, FleetResult, FleetUpdateFailed
from adapter.fleet.story import Story
from adapter.fusion import DEFAULT_RULES, compile_rules
from adapter.outgoing import Outgoing, Planner, WholeTensors
from adapter.planner import Plan, TensorSpec
from adapter.recent import Recent
from adapter.sources.lazy import NamedTensors
from sidecar.v1 import weight_sync_pb2 as pb

logger = logging.getLogger(__name__)

DEFAULT_BUCKET_BYTES = 1 << 30
LOOK_S = 5.0
FENCE_S, FENCE_AGAIN_S = 10.0, 0.5
UPDATE_IN_PROGRESS = "UPDATE_IN_PROGRESS"
MAX_TRIES = 3
MAX_REASON = 500
MAX_SHOWN = 5
MAX_VERSION_IN_ID, MAX_ID_TRIED = 100, 120
OUT_OF_STEP = (pb.SIDECAR_STATE_DIRTY, pb.SIDECAR_STATE_UNSYNCED, pb.SIDECAR_STATE_FENCED)
OnFenced = Callable[[str, str], None]
"""Target and reason: for a router that is to be told."""


class Fleet:
    """Engines that serve one version. Not for use by several threads at once.

    Args:
        members: where their sidecars listen, or a ``Discovery`` that is asked before every update.
        policy: how many of them must take an update before it is published.
        on_fenced: is told of every engine that does not serve the version that was published, and why.
        pause_fenced: whether generation is paused in an engine that is fenced; otherwise it is only not ready.
        credentials: for sidecars with TLS or tokens.
        bucket_bytes: the most that one broadcast carries; each engine takes as much again while it loads it.
        staging_buffers: how many buckets of memory are kept here: with two, one is filled while the other is sent.
        device: where buckets are staged; by default the current CUDA device, else the host. On GPUs, beside engines on
            GPUs, NCCL carries the bytes, else gloo.
        fused_groups: further tensors that must travel together (``adapter.fusion``).
        address: where engines reach this host, if not by the address of the way to the first sidecar.
        patience: seconds that one member may take to begin, or to make ready, before it counts as failed.
        transfer_timeout: seconds that one broadcast may take, the load of the bucket before it included.
        make_group: in place of torch.distributed's, for tests.
    """

    def __init__(
        self,
        members: Discovery | Iterable[str],
        *,
        policy: Policy = ALL_OR_NOTHING,
        on_fenced: OnFenced | None = None,
        pause_fenced: bool = True,
        credentials: Credentials = NO_CREDENTIALS,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        staging_buffers: int = 2,
        device: torch.device | str | None = None,
        fused_groups: Sequence[str] = (),
        address: str | None = None,
        patience: float = 30.0,
        transfer_timeout: float = 120.0,
        make_group: MakeGroup | None = None,
    ) -> None:
        if isinstance(members, str):
            raise ValueError(f"members must be a list of targets, or a Discovery, not the text {members!r}")
        self._discovery: Discovery = Listed(members) if isinstance(members, Iterable) else members
        self._policy = policy
        self._on_fenced = on_fenced or (lambda target, reason: None)
        self._pause_fenced = pause_fenced
        self._credentials = credentials
        self._device = torch.device(device) if device is not None else None
        self._planner = Planner(bucket_bytes, (*DEFAULT_RULES, *compile_rules(fused_groups)), dense=True)
        self._regions = PlainRegions(staging_buffers)
        self._patience_s = patience
        self._transfer_s = transfer_timeout
        self._group = FleetGroup(address, patience, transfer_timeout, make_group)
        self._digests = Recent[Plan, str]()
        self._members: dict[str, Member] = {}
        self._num_sent, self._name = 0, secrets.token_hex(4)
        self._last = pb.UpdateHeader()
        """Of the version that was published last."""
        self.version = ""
        """What the fleet serves: the last version that was published. Empty: none yet, by this object."""

    def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        version: str,
        update_id: str | None = None,
        specs: Sequence[TensorSpec] | None = None,
        check_finite: bool = False,
        pause_mode: str = "retract",
        flush_cache: bool = True,
        selector: str | None = None,
        verify: bool = False,
        content_digest: str = "",
        allow_unknown: Sequence[str] = (),
        allow_missing: Sequence[str] = (),
        timeout: float = 600.0,
    ) -> FleetResult:
        """Bring one version into all members; returns once it is published, and says what became of each of them.

        Arguments are those of ``WeightSyncClient.update_weights``. Where tensors need no gather, a policy that can do
        without some members tries again without those that failed, within ``timeout``.

        Raises:
            FleetUpdateFailed: too few took it: nothing is published.
            ValueError: a tensor, name, dtype or option that cannot be sent.
        """
        cargo = self._planner.outgoing(named_tensors, specs)
        with self._ordered(cargo, self._policy, timeout) as order:
            if check_finite:
                cargo.check_values()
            order.header = pb.UpdateHeader(
                update_id=update_id or self._new_id(version),
                weight_version=version,
                tp_size=1,
                pause_mode=wire.pause_mode(pause_mode),
                selector=wire.selector(selector),
                verify=verify,
                content_digest=content_digest,
                keep_cache=not flush_cache,
                allow=pb.ManifestAllowance(unknown=allow_unknown, missing=allow_missing),
                two_phase=True,
            )
            return self._bring(order, self._look(self._present()))

    def catch_up(
        self, named_tensors: NamedTensors, *, timeout: float = 600.0, pause_mode: str = "retract"
    ) -> FleetResult | None:
        """Bring the fleet's version, whose weights these are, into members that do not serve it.

        None if there is nobody to bring it to: all that can be reached serve it. ``status`` says who cannot be.
        For engines that joined, were started again, failed or were cut off since: whoever can, takes it.
        """
        with self._ordered(self._planner.outgoing(named_tensors, None), BEST_EFFORT, timeout) as order:
            if not self.version:
                raise ValueError("the fleet has published nothing yet: update_weights comes first")
            look = self._look(self._present())
            look.good = {member: status for member, status in look.good.items() if not _serves(status, self.version)}
            if not look.good:
                return None
            order.header.CopyFrom(self._last)
            order.header.update_id = self._new_id(self.version)
            order.header.pause_mode = wire.pause_mode(pause_mode)
            return self._bring(order, look)

    def status(self) -> dict[str, pb.GetStatusResponse | WeightSyncError]:
        """What every member's sidecar says now, by target."""
        look = self._look(self._present())
        found: dict[str, pb.GetStatusResponse | WeightSyncError] = {m.target: s for m, s in look.good.items()}
        return found | {member.target: error for member, error in look.failed.items()}

    def take_part(self, named_tensors: NamedTensors, *, specs: Sequence[TensorSpec] | None = None) -> None:
        """In place of ``update_weights``, on the trainer's other ranks: go through the gathers of rank 0's tensors."""
        self._planner.outgoing(named_tensors, specs).forgo(self._staging_device())

    def release(self) -> None:
        """Give the staging memory back until the next update."""
        self._regions.release()

    def close(self) -> None:
        """Have the engines leave the group, close the connections, and give the memory back."""
        self._group.leave()
        self._regions.release()
        for member in self._members.values():
            member.close()
        self._members.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Members.

    def _present(self) -> list[Member]:
        """Those that the discovery names now; whoever is not named any more is forgotten."""
        targets = self._discovery.targets()
        gone = set(self._members).difference(targets)
        if gone:
            self._group.leave()  # while those that have gone can still be told
        for target in gone:
            self._members.pop(target).close()
        return [self._members.setdefault(target, Member(target, self._credentials)) for target in targets]

    def _look(self, members: Sequence[Member]) -> Answers[pb.GetStatusResponse]:
        """Whether they are there, and what they serve; those that cannot take part fail here."""
        look = ask(members, lambda m: m.stub.rpc.GetStatus.future(pb.GetStatusRequest(), timeout=LOOK_S)).answers()
        for member, status in list(look.good.items()):
            problem = _problem(member, status)
            member.engine, member.group_name = status.engine, status.group.group_name
            if problem is not None:
                look.failed[member] = problem
                del look.good[member]
        return look

    # One version.

    @contextmanager
    def _ordered(self, cargo: Outgoing | WholeTensors, policy: Policy, timeout_s: float) -> Iterator[Order]:
        """Whatever becomes of it, this rank goes through the gathers that the trainer's other ranks go through."""
        filling = Filling(cargo, self._regions, self._staging_device())
        try:
            yield Order(filling, policy, time.monotonic() + timeout_s)
        finally:
            take_part(filling.forgo)

    def _bring(self, order: Order, look: Answers[pb.GetStatusResponse]) -> FleetResult:
        story = Story(look.failed, untouched=set(look.good))
        needed = max(1, order.policy.needed(len(look.good) + len(look.failed)))
        self._try_until_enough(order, story, list(look.good), needed)
        return self._told(order, story, needed)

    def _try_until_enough(self, order: Order, story: Story, pending: list[Member], needed: int) -> None:
        """Again without those that failed, where the policy can do without them."""
        tries = 1 if order.policy.at_least is None else MAX_TRIES
        while pending and story.attempts < tries and order.filling.can_be_sent:
            if not story.decided and len(pending) < needed:
                return
            story.add(self._try(order, story.attempts, pending, 1 if story.decided else needed))
            look = self._look(story.worth_another_try(pending))
            story.lost(look.failed)
            pending = list(look.good)

    def _try(self, order: Order, number: int, members: list[Member], needed: int) -> Try:
        started = time.monotonic()
        try:
            group = self._group.for_members(members, order.filling.device, order.give_up)
        except NotJoined as error:
            return Try(failed=error.failed, untouched=set(members).difference(error.failed), broke=str(error))
        joined_s = time.monotonic() - started
        attempt = Attempt(
            members,
            group,
            order.numbered(number, group.name),
            order.filling.plan,
            self._digests,
            needed=needed,
            patience_s=self._patience_s,
            load_s=self._transfer_s,
            give_up=order.give_up,
        )
        try:
            one = attempt.run(order.filling.start)
        except BaseException:
            self._group.drop()
            raise
        if one.broke or one.failed:
            self._group.drop()
        one.seconds["join"] = joined_s
        return one

    def _told(self, order: Order, story: Story, needed: int) -> FleetResult:
        version = order.header.weight_version
        if story.decided:
            self.version = version
            self._last.CopyFrom(order.header)
            self._fence(story, version)
        engines = story.results()
        if not story.decided:
            errors = {member.target: error for member, error in story.failed.items()}
            raise FleetUpdateFailed(_too_few(order, engines, needed, story.broke), engines, errors)
        sizes = [bucket.num_bytes for bucket in order.filling.plan.buckets]
        return FleetResult(
            weight_version=version,
            engines=engines,
            num_buckets=len(sizes),
            num_bytes=sum(sizes),
            attempts=story.attempts,
            seconds=story.seconds,
            slowest=story.slowest(),
        )

    def _fence(self, story: Story, version: str) -> None:
        """Whoever is left behind must not be taken for a member that serves the fleet's version."""
        left_behind = {member: str(error) for member, error in story.failed.items()}
        left_behind |= dict.fromkeys(story.untouched, "it took no part")

        def fencing(member: Member) -> grpc.Future[pb.FenceEngineResponse]:
            reason = f"the fleet serves {version!r}, this engine does not: {left_behind[member]}"[:MAX_REASON]
            request = pb.FenceEngineRequest(reason=reason, pause=self._pause_fenced)
            return member.stub.rpc.FenceEngine.future(request, timeout=FENCE_S)

        reachable = [
            m for m in left_behind if not isinstance(story.failed.get(m), SidecarUnreachable | EngineUnreachable)
        ]
        give_up = time.monotonic() + FENCE_S
        while reachable:
            answers = ask(reachable, fencing).answers()
            story.fenced.update(answers.good)
            reachable = [m for m, error in answers.failed.items() if error.reason == UPDATE_IN_PROGRESS]
            if time.monotonic() > give_up:
                break
            time.sleep(FENCE_AGAIN_S if reachable else 0.0)
        for member, why in left_behind.items():
            logger.warning("%s does not serve version %s: %s", member.target, version, why)
            self._tell(member.target, why)

    def _tell(self, target: str, why: str) -> None:
        try:
            self._on_fenced(target, why)
        except Exception:  # somebody else's code, which must not cost the result
            logger.exception("on_fenced failed for %s", target)

    # Tensors.

    def _staging_device(self) -> torch.device:
        device = self._device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type != "cuda":
            return device
        refuse_forked_cuda()
        return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())

    def _new_id(self, version: str) -> str:
        """Another one for every update, of any trainer: a version that is brought again is another update."""
        self._num_sent += 1
        return f"{version[:MAX_VERSION_IN_ID]} #{self._name}-{self._num_sent}"


@dataclass(slots=True)
class Order:
    """What is to be brought, and how."""

    filling: Filling
    policy: Policy
    give_up: float
    """On the monotonic clock."""
    header: pb.UpdateHeader = field(default_factory=pb.UpdateHeader)

    def numbered(self, number: int, group_name: str) -> pb.UpdateHeader:
        """The header of one try, over that group."""
        header = pb.UpdateHeader()
        header.CopyFrom(self.header)
        header.group_name = group_name
        if number:
            header.update_id = f"{header.update_id[-MAX_ID_TRIED:]} try {number + 1}"
        return header


def _problem(member: Member, status: pb.GetStatusResponse) -> WeightSyncError | None:
    """Why this member cannot take part, if it cannot."""
    if not status.HasField("engine"):
        return EngineUnreachable(f"the sidecar at {member.target} waits for its engine: {status.reason}")
    if status.engine.unsupported_reason:
        return UpdateRefused(f"the engine of {member.target} cannot be updated: {status.engine.unsupported_reason}")
    if status.state == pb.SIDECAR_STATE_DRAINING:
        return SidecarUnreachable(f"the sidecar at {member.target} is stopping", reason="DRAINING")
    return None


def _serves(status: pb.GetStatusResponse, version: str) -> bool:
    return status.weight_version == version and status.state not in OUT_OF_STEP


def _too_few(order: Order, engines: Mapping[str, EngineResult], needed: int, broke: str) -> str:
    version = order.header.weight_version
    reached = sum(engine.state is EngineState.PUBLISHED for engine in engines.values())
    problems = [f"{engine.target}: {engine.error}" for engine in engines.values() if engine.error]
    shown = "; ".join(problems[:MAX_SHOWN]) + (f"; and {len(problems) - MAX_SHOWN} more" * (len(problems) > MAX_SHOWN))
    if not engines:
        return f"version {version!r} was not published: the fleet has no member"
    took = f"{order.policy}: {reached} of {needed} engines took it"
    return f"version {version!r} was not published ({took}): {shown or broke}"
