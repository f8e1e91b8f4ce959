"""What ``health`` and ``status`` ask of a running sidecar, and how they say it.

Invariant: each look ends within its time-out, with a sentence, whatever is at the other end; what is shown moves no
terminal's cursor, whatever is in an id or an error.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.channels import NO_PROXY
from sidecar.logs import one_line
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["WeightSyncService"].full_name
HOME, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
INDENT = " " * 9

Connect = Callable[[str], grpc.Channel]


def in_clear(target: str) -> grpc.Channel:
    """A channel without TLS or token."""
    return grpc.insecure_channel(target, options=NO_PROXY)


def is_serving(target: str, *, liveness: bool, timeout_s: float, connect: Connect = in_clear) -> tuple[bool, str]:
    """Whether the sidecar is ready (or alive), and why not."""
    service = "" if liveness else SERVICE_NAME
    with connect(target) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return True, ""
            return False, _status(channel, timeout_s).reason or "see `status`"
        except grpc.RpcError as error:
            return False, _failed(target, error, "is it running?")


def status_text(target: str, *, timeout_s: float, connect: Connect = in_clear) -> tuple[bool, str]:
    """Whether the sidecar answered, and its state for a person to read."""
    with connect(target) as channel:
        try:
            return True, describe(_status(channel, timeout_s))
        except grpc.RpcError as error:
            return False, _failed(target, error, "is it running?")


def watch(
    target: str,
    *,
    interval_s: float,
    timeout_s: float,
    connect: Connect = in_clear,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show the state again and again, until Ctrl-C: drawn anew on a terminal, else printed when it has changed."""
    watched, shown = _Watched(target, timeout_s, connect), _Shown(out or sys.stdout, target)
    with suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            while True:
                shown.show(*watched.look())
                sleep(interval_s)
        finally:
            watched.close()
    return 0


class _Watched:
    """A sidecar that may go away and come back. A channel that has failed is replaced: it would wait to try again."""

    def __init__(self, target: str, timeout_s: float, connect: Connect) -> None:
        self._target, self._timeout_s, self._connect = target, timeout_s, connect
        self._channel: grpc.Channel | None = None

    def look(self) -> tuple[str, str]:
        """The text, and what of it is news: durations that run are not."""
        self._channel = self._channel or self._connect(self._target)
        try:
            status = _status(self._channel, self._timeout_s)
        except grpc.RpcError as error:
            self.close()
            return (_failed(self._target, error, "waiting for it"),) * 2
        return describe(status), describe(status, running=False)

    def close(self) -> None:
        """Let the channel go."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class _Shown:
    """What a person has in sight."""

    def __init__(self, out: TextIO, target: str) -> None:
        self._out, self._target = out, target
        self._news = ""

    def show(self, text: str, news: str) -> None:
        """Draw over what was there, or, where that is not possible, tell news."""
        if self._out.isatty():
            lines = [f"{time.strftime('%H:%M:%S')}  {self._target}", "", *text.split("\n")]
            drawn = "".join(f"{line}{CLEAR_LINE}\n" for line in lines)
            print(HOME + drawn + CLEAR_REST, end="", file=self._out, flush=True)
        elif news != self._news:
            print(f"{text}\n", file=self._out, flush=True)
        self._news = news


def describe(status: pb.GetStatusResponse, *, running: bool = True) -> str:
    """One line per fact. ``running``: with the time that the update in hand has taken so far."""
    lines = [_line("state", _name(pb.SidecarState.Name(status.state), "SIDECAR_STATE_"), status.reason)]
    if status.HasField("engine"):
        engine = status.engine
        loader = ", replay loader" if engine.replays else ""
        lines.append(_line("engine", f"SGLang {engine.version}, tp_size {engine.tp_size}, {engine.device}{loader}"))
        if engine.gpu_uuids:
            lines.append(_line("gpus", ", ".join(uuid or "unknown" for uuid in engine.gpu_uuids)))
    if status.HasField("group"):
        lines.append(_group(status.group))
    lines.append(_line("serves", f"version {status.weight_version!r}" if status.weight_version else "no one version"))
    if status.HasField("current_update"):
        lines += _current(status.current_update, running=running)
    if status.HasField("last_update"):
        lines += _last(status.last_update)
    return "\n".join(map(one_line, lines))


def _group(group: pb.WeightsUpdateGroup) -> str:
    """Which of its ranks the engine's are is told by the first."""
    at = f"{group.master_address}:{group.master_port}"
    text = f"{group.group_name!r} of {group.world_size} ranks ({group.backend}, {at}), the engine's from "
    return _line("group", f"{text}{group.rank_offset} on")


def _current(update: pb.UpdateOutcome, *, running: bool) -> list[str]:
    text = f"{_title(update)}, bucket {update.num_posted} of {update.num_buckets}"
    *before, now = update.phases or [pb.PhaseDuration()]
    if now.phase not in (pb.PHASE_UNSPECIFIED, pb.PHASE_COLLECT):
        text += f", {_phase(now)}"
    if update.waiting_for_ranks:
        text += f", waits for ranks {list(update.waiting_for_ranks)}"
    if running:
        text += f", for {_sum(update)} now"
    return [_line("update", text), *_details(update, before)]


def _last(update: pb.UpdateOutcome) -> list[str]:
    text = f"{_title(update)} in {_sum(update)}, bucket {update.num_posted} of {update.num_buckets}"
    if update.transport:
        text += f", {_name(pb.Transport.Name(update.transport), 'TRANSPORT_')}"
    if update.load_path:
        text += f", {_name(pb.LoadPath.Name(update.load_path), 'LOAD_PATH_')}"
    if update.load_reason:
        text += f" ({update.load_reason})"
    if update.verification:
        text += f", {_name(pb.Verification.Name(update.verification), 'VERIFICATION_')}"
    return [_line("last", text), *_details(update, list(update.phases))]


def _details(update: pb.UpdateOutcome, phases: list[pb.PhaseDuration]) -> list[str]:
    """What took how long, what went wrong, and what else is to be known of it."""
    took = ", ".join(f"{_phase(phase)} {_seconds(phase.duration)}" for phase in phases)
    return [INDENT + text for text in (took, update.error, *update.notes) if text]


def _title(update: pb.UpdateOutcome) -> str:
    state = _name(pb.UpdateState.Name(update.state), "UPDATE_STATE_")
    return f"{update.update_id!r} (version {update.weight_version!r}) {state}"


def _phase(phase: pb.PhaseDuration) -> str:
    return _name(pb.Phase.Name(phase.phase), "PHASE_")


def _sum(update: pb.UpdateOutcome) -> str:
    return _seconds(*(phase.duration for phase in update.phases))


def _seconds(*durations: Duration) -> str:
    milliseconds = sum(duration.ToMilliseconds() for duration in durations)
    if milliseconds < 1000:
        return f"{milliseconds} ms"
    seconds = milliseconds / 1000
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _line(label: str, text: str, why: str = "") -> str:
    return f"{label + ':':<8} {text}" + (f" - {why}" if why else "")


def _name(value: str, prefix: str) -> str:
    return value.removeprefix(prefix).lower()


def _status(channel: grpc.Channel, timeout_s: float) -> pb.GetStatusResponse:
    return pb_grpc.WeightSyncServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=timeout_s)


def _failed(target: str, error: grpc.RpcError, then: str) -> str:
    call = cast("grpc.Call", error)  # every error of a call is one
    said = one_line(call.details() or call.code().name)
    if call.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"the sidecar at {target} does not let this caller look: {said}"
    return f"the sidecar at {target} does not answer ({said}); {then}"
