"""Updates over a torch.distributed group, call by call; the scripted engine makes up what would be broadcast."""

from __future__ import annotations

from typing import TypeAlias

import grpc

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes.groups import DESTROY, INIT, RECEIVE
from tests.integration.support import ANSWER_S, SESSIONS, Pair, Refusal, header, refusal, wait_until

__all__ = ["BEGIN", "DESTROY", "END", "INIT", "PAUSE", "PUBLISH", "RECEIVE", "RESUME"]

PAUSE, RESUME = "/pause_generation", "/continue_generation"
BEGIN, END = "/begin_weight_update", "/end_weight_update"
FLUSH, PUBLISH = "/flush_cache", "/update_weight_version"

Joining: TypeAlias = "grpc.Future[pb.InitWeightsUpdateGroupResponse]"
Preparing: TypeAlias = "grpc.Future[pb.PrepareUpdateResponse]"
Committing: TypeAlias = "grpc.Future[pb.CommitUpdateResponse]"
Publishing: TypeAlias = "grpc.Future[pb.PublishUpdateResponse]"
Holding: TypeAlias = "grpc.Future[pb.HoldUpdateResponse]"


def made_ready(release: str) -> list[str]:
    """What is posted until the engine waits for its first bucket."""
    return [PAUSE, BEGIN] if release == SESSIONS else [PAUSE]


def received(release: str, num_buckets: int) -> list[str]:
    """What is posted then, until the version is."""
    return [*[RECEIVE] * num_buckets, *([END] if release == SESSIONS else []), FLUSH]


def group(pair: Pair, name: str, **changes: object) -> pb.WeightsUpdateGroup:
    """One that an engine with two ranks fits into, and whose store is where something listens."""
    place = {"master_address": "127.0.0.1", "master_port": pair.engine.port}
    fields = place | {"rank_offset": 1, "world_size": 3, "backend": "gloo"}
    return pb.WeightsUpdateGroup(group_name=name, **(fields | changes))  # type: ignore[arg-type]


def join(pair: Pair, name: str, timeout_s: float = ANSWER_S, **changes: object) -> Joining:
    request = pb.InitWeightsUpdateGroupRequest(group=group(pair, name, **changes))
    return pair.rpc.InitWeightsUpdateGroup.future(request, timeout=timeout_s)


def joined(pair: Pair, name: str) -> None:
    """The engine is in a group of that name; POSTs count from here."""
    join(pair, name).result(ANSWER_S)
    pair.mark()


def leave(pair: Pair, name: str) -> bool:
    request = pb.DestroyWeightsUpdateGroupRequest(group_name=name)
    return pair.rpc.DestroyWeightsUpdateGroup(request, timeout=ANSWER_S).was_joined


def dense_manifest(num_buckets: int = 1) -> pb.Manifest:
    """Without gaps, as it must be over a group."""
    return pb.Manifest(buckets=[_bucket(number) for number in range(num_buckets)])


def _bucket(number: int) -> pb.BucketSpec:
    weight = pb.TensorSpec(
        name=f"layer.{number}.weight", dtype=pb.DATA_TYPE_FLOAT32, shape=[2, 3], byte_offset=0, size_bytes=24
    )
    bias = pb.TensorSpec(
        name=f"layer.{number}.bias", dtype=pb.DATA_TYPE_BFLOAT16, shape=[4], byte_offset=24, size_bytes=8
    )
    return pb.BucketSpec(size_bytes=32, tensors=[weight, bias])


def begin(
    pair: Pair,
    update_id: str,
    rank: int = 0,
    *,
    tp_size: int = 1,
    num_buckets: int = 2,
    manifest: pb.Manifest | None = None,
    **changes: object,
) -> grpc.Future[pb.BeginUpdateResponse]:
    """One rank opens its part of an update over the group that is called as the update is, unless told otherwise."""
    head = header(update_id, rank, tp_size)
    head.MergeFrom(pb.UpdateHeader(**({"group_name": update_id} | changes)))  # type: ignore[arg-type]
    reference = pb.ManifestReference(manifest=manifest or dense_manifest(num_buckets))
    return pair.rpc.BeginUpdate.future(pb.BeginUpdateRequest(update=head, manifest=reference), timeout=ANSWER_S)


def prepare(pair: Pair, update_id: str, rank: int = 0, timeout_s: float = ANSWER_S) -> Preparing:
    return pair.rpc.PrepareUpdate.future(pb.PrepareUpdateRequest(update_id=update_id, rank=rank), timeout=timeout_s)


def publish(pair: Pair, update_id: str, rank: int = 0, timeout_s: float = ANSWER_S) -> Publishing:
    return pair.rpc.PublishUpdate.future(pb.PublishUpdateRequest(update_id=update_id, rank=rank), timeout=timeout_s)


def abort(pair: Pair, update_id: str, rank: int = 0) -> pb.UpdateOutcome:
    request = pb.AbortUpdateRequest(update_id=update_id, rank=rank, reason="a whim")
    return pair.rpc.AbortUpdate(request, timeout=ANSWER_S).outcome


def hold(pair: Pair, update_id: str, rank: int = 0) -> Holding:
    """Open at the sidecar by the time that this returns."""
    held = pair.rpc.HoldUpdate.future(pb.HoldUpdateRequest(update_id=update_id, rank=rank), timeout=ANSWER_S)
    pair.status()  # answered after the call before it has begun
    return held


def ready(pair: Pair, update_id: str, *, tp_size: int = 1, num_buckets: int = 2, two_phase: bool = False) -> None:
    """Joined, begun and prepared by every rank: the engine waits for the first bucket."""
    joined(pair, update_id)
    for rank in range(tp_size):
        begin(pair, update_id, rank, tp_size=tp_size, num_buckets=num_buckets, two_phase=two_phase).result(ANSWER_S)
    for preparing in [prepare(pair, update_id, rank) for rank in range(tp_size)]:
        preparing.result(ANSWER_S)


def decided_on(pair: Pair, update_id: str, num_buckets: int = 2) -> None:
    """In two phases, and waiting for the word to publish."""
    ready(pair, update_id, num_buckets=num_buckets, two_phase=True)
    outcome = pair.commit(update_id, 0).result(ANSWER_S).outcome
    assert outcome.state == pb.UPDATE_STATE_APPLYING


def whole_update(pair: Pair, update_id: str) -> pb.UpdateOutcome:
    """A good one."""
    ready(pair, update_id)
    return pair.commit(update_id, 0).result(ANSWER_S).outcome


def ended(pair: Pair, update_id: str, timeout_s: float = ANSWER_S) -> pb.UpdateOutcome:
    wait_until(lambda: pair.outcome(update_id).state > pb.UPDATE_STATE_APPLYING, timeout_s)
    return pair.outcome(update_id)


def refused_commit(pair: Pair, update_id: str) -> Refusal:
    """How a commit that must fail does."""
    return refusal(pair.commit(update_id, 0))


def assert_goes_on_with_old_weights(pair: Pair, before: list[dict[str, str]]) -> None:
    """The engine is as it was: nothing loaded, nothing open, generation runs."""
    assert pair.engine.loaded == before
    assert (pair.is_paused(), pair.engine.session_open) == (False, False)
    assert pair.wait_for(pb.SIDECAR_STATE_READY)


def assert_dirty(pair: Pair) -> None:
    """Held, without an open session, until the next complete update."""
    assert (pair.is_paused(), pair.engine.session_open) == (True, False)
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_DIRTY, "")
