"""The adapter's types -> the protocol's, and back. No decision is taken here."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from adapter.errors import UpdateAborted, UpdateFailed, WeightSyncError
from adapter.planner import Bucket, Placement, Plan
from sidecar.v1 import weight_sync_pb2 as pb

_PHASE_PREFIX = "PHASE_"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """How an update went."""

    update_id: str
    weight_version: str
    """What the engine's answers carry from now on."""
    num_posts: int
    """Loads that the engine was asked for: one per bucket, whatever the number of ranks."""
    cache_flushed: bool
    """Whether the prefix cache was emptied. If not, later answers may rest on KV of the old weights."""
    phases: dict[str, float]
    """Seconds by phase: collect, pause, begin, load, end, flush, verify, publish, resume."""
    verification: str = ""
    """With ``verify``: "consistent" (all ranks agree; nothing to compare the content with), "proven" (and equal to the
    last verified update with this content digest), or "unavailable" (this engine computes no checksums)."""
    notes: tuple[str, ...] = ()
    """What a person should know of it, in sentences."""
    load_path: str = ""
    """Who has written the weights: "replayed" (the replay loader), "stock" (the model's own load), "proven" (both, with
    the same result), "recorded" (the model's own, observed), or "fell_back" (the model's own, as it cannot be
    replayed). The slowest of all buckets and ranks."""
    load_reason: str = ""
    """Why it was not a replay, where the engine has the replay loader."""


def manifest(plan: Plan) -> pb.Manifest:
    """The plan as every rank sends it."""
    return pb.Manifest(buckets=[_bucket(bucket) for bucket in plan.buckets])


def _bucket(bucket: Bucket) -> pb.BucketSpec:
    return pb.BucketSpec(size_bytes=bucket.num_bytes, tensors=[_tensor(place) for place in bucket.placements])


def _tensor(place: Placement) -> pb.TensorSpec:
    spec = place.spec
    return pb.TensorSpec(
        name=spec.name,
        dtype=data_type(str(spec.dtype)),
        shape=spec.shape,
        byte_offset=place.byte_offset,
        size_bytes=spec.num_bytes,
    )


@cache
def data_type(dtype: str) -> pb.DataType.ValueType:
    """Torch's name of a dtype ("torch.bfloat16") -> the protocol's; raises ``ValueError`` if it has none."""
    name = "DATA_TYPE_" + dtype.removeprefix("torch.").upper()
    if name not in pb.DataType.keys():  # noqa: SIM118 - an enum wrapper, not a dict
        raise ValueError(f"dtype {dtype} cannot be sent; cast the tensor first")
    return pb.DataType.Value(name)


def pause_mode(name: str) -> pb.PauseMode.ValueType:
    """The name of a pause mode ("retract", "in_place", "abort", "drain", "none") -> the protocol's."""
    return pb.PauseMode.Value(_enum_key("pause_mode", "PAUSE_MODE_", name, pb.PauseMode.keys()))


def selector(name: str | None) -> pb.Selector.ValueType:
    """The name of an engine's model ("target", "draft", "all"; None: not said) -> the protocol's."""
    if name is None:
        return pb.SELECTOR_UNSPECIFIED
    return pb.Selector.Value(_enum_key("selector", "SELECTOR_", name, pb.Selector.keys()))


def _enum_key(what: str, prefix: str, name: str, keys: Sequence[str]) -> str:
    known = [key.removeprefix(prefix).lower() for key in keys[1:]]
    if name not in known:
        raise ValueError(f"{what} {name!r} is none of {', '.join(known)}")
    return prefix + name.upper()


def result(outcome: pb.UpdateOutcome) -> UpdateResult:
    """A committed update's outcome."""
    return UpdateResult(
        update_id=outcome.update_id,
        weight_version=outcome.weight_version,
        num_posts=outcome.num_posted,
        cache_flushed=outcome.cache_flushed,
        verification=_verification(outcome.verification),
        notes=tuple(outcome.notes),
        load_path=_lower(pb.LoadPath.Name(outcome.load_path), "LOAD_PATH_") if outcome.load_path else "",
        load_reason=outcome.load_reason,
        phases={
            pb.Phase.Name(phase.phase).removeprefix(_PHASE_PREFIX).lower(): phase.duration.ToMicroseconds() / 1e6
            for phase in outcome.phases
        },
    )


def failure(outcome: pb.UpdateOutcome) -> WeightSyncError | None:
    """Why an update that has ended was not committed; None if it was."""
    if outcome.state == pb.UPDATE_STATE_COMMITTED:
        return None
    kind: type[WeightSyncError] = UpdateFailed if outcome.state == pb.UPDATE_STATE_FAILED else UpdateAborted
    return kind(outcome.error, reason=outcome.error_reason)


def _lower(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


def _verification(value: pb.Verification.ValueType) -> str:
    return pb.Verification.Name(value).removeprefix("VERIFICATION_").lower() if value else ""
