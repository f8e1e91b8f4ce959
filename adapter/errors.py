"""Every failure that a trainer can see, in one tree.

    WeightSyncError
      x LaunchError            a process that was started here did not come up, or died; carries the end of its log
      x SidecarUnreachable     nobody answers at the target, or the sidecar is stopping
      x NotAllowed             its token or certificate is not one that the sidecar lets do this
      x IncompatibleSidecar    the sidecar is older than this adapter and cannot do what was asked
      x EngineUnreachable      the sidecar is there, its SGLang server is not
      x UpdateRefused          the request is wrong, or does not fit the engine; nothing was touched
      x UpdateAborted          ranks disagreed, one gave up, or the engine was restarted: no new weights are served
      x RanksMissing           a deadline passed while the sidecar waited for other ranks
      x UpdateStillApplying    a deadline passed while the engine was loading; an update in one call goes on: ask
                               ``get_update``; one in buckets is aborted by its client
      x MemoryNotExportable    another process cannot open this memory; nothing was sent
      x UpdateFailed           broke off half-way: the engine is dirty until the next complete update
      x GroupBroken            a torch.distributed group could not be joined, or a member of it is gone
      x FleetUpdateFailed      too few engines of a fleet took the update; says of each what happened

Mapped from gRPC once, in ``from_rpc_error``.
"""

from collections.abc import Mapping
from typing import cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

ERROR_DOMAIN = "sglang-weight-sync"
# gRPC's words for a call that it had no connection for (seen in 1.81 to 1.85).
NOT_CONNECTED = "failed to connect to all addresses"
STOPPED = "stopped before it took this call"
OF_A_STOPPED_SERVER = (None, "", "CANCELLED")
"""Details of a call that a server dropped as it stopped; cancelled here, or on the way, they are others."""


class WeightSyncError(Exception):
    """Base of everything that this package raises on purpose."""

    def __init__(self, message: str, *, reason: str = "", details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        """The sidecar's stable name of it, such as "RANKS_MISSING"; empty if it did not come from the sidecar."""
        self.details = dict(details or {})


class LaunchError(WeightSyncError):
    """A process that was started here did not come up, or died."""


class SidecarUnreachable(WeightSyncError):
    """Nobody answers at the target, or the sidecar is stopping."""

    @property
    def took_nothing(self) -> bool:
        """Whether the sidecar surely took nothing of the call, so that it may be made again."""
        return self.reason == "DRAINING" or NOT_CONNECTED in str(self) or STOPPED in str(self)


class NotAllowed(WeightSyncError):
    """The sidecar does not know this caller's token or certificate, or lets it only look."""


class IncompatibleSidecar(WeightSyncError):
    """The sidecar is older than this adapter and cannot do what was asked."""


class EngineUnreachable(WeightSyncError):
    """The sidecar is there, its SGLang server is not."""


class UpdateRefused(WeightSyncError):
    """The request is wrong, or does not fit the engine; nothing was touched."""


class UpdateAborted(WeightSyncError):
    """Ranks disagreed, one gave up, or the engine was restarted: it serves no part of this update."""


class RanksMissing(WeightSyncError):
    """A deadline passed while the sidecar waited for other ranks."""


class UpdateStillApplying(WeightSyncError):
    """A deadline passed while the engine was loading."""


class MemoryNotExportable(WeightSyncError):
    """Another process cannot open this memory; nothing was sent."""


class UpdateFailed(WeightSyncError):
    """Broke off half-way: the engine is dirty until the next complete update."""

    @property
    def num_posted(self) -> int | None:
        """Buckets that the engine may have opened; None if the sidecar did not say."""
        posted = self.details.get("numPosted")
        return None if posted is None else int(posted)


class GroupBroken(WeightSyncError):
    """A torch.distributed group could not be joined, or a member of it is gone."""


_BY_REASON: dict[str, type[WeightSyncError]] = {
    "RANKS_MISSING": RanksMissing,
    "STILL_APPLYING": UpdateStillApplying,
    "UPDATE_FAILED": UpdateFailed,
    "ENGINE_UNREACHABLE": EngineUnreachable,
    "ENGINE_LOST": UpdateAborted,
    "ENGINE_TIMEOUT": UpdateAborted,
    "DRAINING": SidecarUnreachable,
    "UNKNOWN_FIELD": IncompatibleSidecar,
}
_BY_CODE: dict[grpc.StatusCode, type[WeightSyncError]] = {
    grpc.StatusCode.UNAVAILABLE: SidecarUnreachable,
    grpc.StatusCode.CANCELLED: SidecarUnreachable,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowed,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleSidecar,
    grpc.StatusCode.ABORTED: UpdateAborted,
    grpc.StatusCode.INVALID_ARGUMENT: UpdateRefused,
    grpc.StatusCode.ALREADY_EXISTS: UpdateRefused,
    grpc.StatusCode.NOT_FOUND: UpdateRefused,
    grpc.StatusCode.FAILED_PRECONDITION: UpdateRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UpdateRefused,
}
_SENTENCES = {
    grpc.StatusCode.UNAVAILABLE: "the sidecar at {target} cannot be reached ({details}); is it running?",
    # By a server that stops, for a call that had just come in: one that was taken is answered before.
    grpc.StatusCode.CANCELLED: f"the sidecar at {{target}} {STOPPED}",
    grpc.StatusCode.UNIMPLEMENTED: "the sidecar at {target} is older than this adapter: {details}; upgrade it",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the sidecar at {target} did not answer in time ({details})",
}


def from_rpc_error(error: grpc.RpcError, target: str) -> WeightSyncError:
    """The typed error for a failed call to the sidecar at ``target``."""
    call = cast("grpc.Call", error)  # every error of a call is one
    code, info = call.code(), _error_info(call)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code, WeightSyncError)
    details = call.details() or code.name
    if (
        code is grpc.StatusCode.CANCELLED and call.details() not in OF_A_STOPPED_SERVER
    ):  # nobody knows what became of it
        details = f"the call to the sidecar at {target} was cancelled ({details})"
    elif not info.reason:
        details = _SENTENCES.get(code, "the sidecar at {target} failed: {details}").format(
            target=target, details=details
        )
    return kind(details, reason=info.reason, details=dict(info.metadata))


def _error_info(call: grpc.Call) -> ErrorInfo:
    """The sidecar's own words about the error; empty if it did not come from the sidecar."""
    status = rpc_status.from_call(call)
    for detail in status.details if status else ():
        info = ErrorInfo()
        if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return info
    return ErrorInfo()
