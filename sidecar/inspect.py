"""What ``health`` and ``status`` ask of a running sidecar, and how they say it.

Invariant: both end within their time-out, with a sentence, whatever is at the other end.
"""

from typing import cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

# A proxy from the environment must not see calls that stay on this host.
NO_PROXY = (("grpc.enable_http_proxy", 0),)
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["WeightSyncService"].full_name


def is_serving(target: str, *, liveness: bool, timeout_s: float) -> tuple[bool, str]:
    """Whether the sidecar is ready (or alive), and why not."""
    service = "" if liveness else SERVICE_NAME
    with grpc.insecure_channel(target, options=NO_PROXY) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return True, ""
            return False, _status(channel, timeout_s).reason or "see `status`"
        except grpc.RpcError as error:
            return False, _unreachable(target, error)


def status_text(target: str, *, timeout_s: float) -> tuple[bool, str]:
    """Whether the sidecar answered, and its state for a person to read."""
    with grpc.insecure_channel(target, options=NO_PROXY) as channel:
        try:
            return True, describe(_status(channel, timeout_s))
        except grpc.RpcError as error:
            return False, _unreachable(target, error)


def describe(status: pb.GetStatusResponse) -> str:
    """One line per fact."""
    lines = [_line("state", _name(pb.SidecarState.Name(status.state), "SIDECAR_STATE_"), status.reason)]
    if status.HasField("engine"):
        engine = status.engine
        lines.append(_line("engine", f"SGLang {engine.version}, tp_size {engine.tp_size}, {engine.device}"))
        if engine.gpu_uuids:
            lines.append(_line("gpus", ", ".join(uuid or "unknown" for uuid in engine.gpu_uuids)))
    lines.append(_line("serves", f"version {status.weight_version!r}" if status.weight_version else "no one version"))
    if status.HasField("current_update"):
        lines.append(_line("update", *_update(status.current_update)))
    if status.HasField("last_update"):
        lines.append(_line("last", *_update(status.last_update)))
    return "\n".join(lines)


def _update(update: pb.UpdateOutcome) -> tuple[str, str]:
    state = _name(pb.UpdateState.Name(update.state), "UPDATE_STATE_")
    text = f"{update.update_id!r} (version {update.weight_version!r}) {state}"
    text += f", bucket {update.num_posted} of {update.num_buckets}"
    if update.waiting_for_ranks:
        text += f", waits for ranks {list(update.waiting_for_ranks)}"
    if update.verification:
        text += f", {_name(pb.Verification.Name(update.verification), 'VERIFICATION_')}"
    for phase in update.phases:
        name = _name(pb.Phase.Name(phase.phase), "PHASE_")
        text += f"; {name} {phase.duration.ToMilliseconds()} ms"
    return text, "; ".join(filter(None, [update.error, *update.notes]))


def _line(label: str, text: str, why: str = "") -> str:
    return f"{label + ':':<8} {text}" + (f" - {why}" if why else "")


def _name(value: str, prefix: str) -> str:
    return value.removeprefix(prefix).lower()


def _status(channel: grpc.Channel, timeout_s: float) -> pb.GetStatusResponse:
    return pb_grpc.WeightSyncServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=timeout_s)


def _unreachable(target: str, error: grpc.RpcError) -> str:
    details = cast("grpc.Call", error).details()  # every error of a call is one
    return f"the sidecar at {target} does not answer ({details}); is it running?"
