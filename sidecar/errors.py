"""Every failure that a caller of the sidecar can see, in one tree.

    SyncError
      + InvalidRequest        INVALID_ARGUMENT     the request itself is wrong; nothing was touched
      + RankAlreadyDelivered  ALREADY_EXISTS       this rank, or this update id, came before with other content
      + NotKnown              NOT_FOUND            no such update or manifest digest
      + UpdateConflict        ABORTED              ranks disagree, or another update is in hand
      + UnsuitableEngine      FAILED_PRECONDITION  the engine cannot take this update
      + LimitExceeded         RESOURCE_EXHAUSTED   too large, or too many at a time
      + Unauthenticated       UNAUTHENTICATED      the caller brings no token that is known here
      + Forbidden             PERMISSION_DENIED    the caller is known, and may not do this
      + Draining              UNAVAILABLE          the sidecar is stopping
      + DeadlinePassed        DEADLINE_EXCEEDED    names the phase and the ranks or bucket waited for
      + ChecksumsDiffer       DATA_LOSS            the engine does not hold what was sent
      + UpdateFailed          INTERNAL             broke off after the engine was touched: it is dirty
      + EngineError
          x EngineUnreachable UNAVAILABLE          the request never reached the engine
              x EngineDown    UNAVAILABLE          nobody listens at its port: that server is gone for good
          x EngineRefused     FAILED_PRECONDITION  the engine answered no
          x EngineBusy        ABORTED              requests are in flight, and the update may not meet any
          x EngineLost        INTERNAL             sent, and no answer came: its fate is unknown
              x EngineTimeout INTERNAL             the same, and the engine may be at it still
          x EngineRestarted   ABORTED              another server answers than the one the update began with

Mapped to gRPC once, in ``interceptors``; engine failures are mapped in once, in ``engine.http``. ``reason`` is
stable (ErrorInfo.reason); ``details`` repeats every value that the message names (ErrorInfo.metadata).
"""

from enum import StrEnum
from typing import ClassVar

import grpc


class Reason(StrEnum):
    """Stable names of what went wrong, for programs."""

    UNKNOWN_FIELD = "UNKNOWN_FIELD"
    INVALID_HEADER = "INVALID_HEADER"
    RANK_OUT_OF_RANGE = "RANK_OUT_OF_RANGE"
    EMPTY_UPDATE = "EMPTY_UPDATE"
    INVALID_TENSOR = "INVALID_TENSOR"
    INVALID_HANDLE = "INVALID_HANDLE"
    INVALID_ADAPTER = "INVALID_ADAPTER"
    RANK_DELIVERED_TWICE = "RANK_DELIVERED_TWICE"
    UPDATE_ID_REUSED = "UPDATE_ID_REUSED"
    UPDATE_UNKNOWN = "UPDATE_UNKNOWN"
    MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"
    RANKS_DIFFER = "RANKS_DIFFER"
    UPDATE_IN_PROGRESS = "UPDATE_IN_PROGRESS"
    UPDATE_ABORTED = "UPDATE_ABORTED"
    TP_SIZE_MISMATCH = "TP_SIZE_MISMATCH"
    ENGINE_UNSUPPORTED = "ENGINE_UNSUPPORTED"
    MEMORY_KIND_MISMATCH = "MEMORY_KIND_MISMATCH"
    GPU_MISMATCH = "GPU_MISMATCH"
    MEMORY_IS_KEPT = "MEMORY_IS_KEPT"
    NOT_ABORTABLE = "NOT_ABORTABLE"
    TOO_LARGE = "TOO_LARGE"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    NOT_A_MESSAGE = "NOT_A_MESSAGE"
    TOKEN_WRONG = "TOKEN_WRONG"  # noqa: S105 - a name
    NOT_ALLOWED = "NOT_ALLOWED"
    NOT_YOURS = "NOT_YOURS"
    DRAINING = "DRAINING"
    RANKS_MISSING = "RANKS_MISSING"
    STILL_APPLYING = "STILL_APPLYING"
    UPDATE_FAILED = "UPDATE_FAILED"
    ENGINE_UNREACHABLE = "ENGINE_UNREACHABLE"
    ENGINE_REFUSED = "ENGINE_REFUSED"
    ENGINE_LOST = "ENGINE_LOST"
    ENGINE_RESTARTED = "ENGINE_RESTARTED"
    VERSION_NOT_NEW = "VERSION_NOT_NEW"
    ENGINE_TIMEOUT = "ENGINE_TIMEOUT"
    ENGINE_BUSY = "ENGINE_BUSY"
    PAUSE_MODE_UNSUITABLE = "PAUSE_MODE_UNSUITABLE"
    SELECTOR_UNSUITABLE = "SELECTOR_UNSUITABLE"
    MANIFEST_MISMATCH = "MANIFEST_MISMATCH"
    CHECKSUMS_DIFFER = "CHECKSUMS_DIFFER"
    INVALID_GROUP = "INVALID_GROUP"
    GROUP_UNSUITABLE = "GROUP_UNSUITABLE"
    GROUP_UNREACHABLE = "GROUP_UNREACHABLE"
    GROUP_UNKNOWN = "GROUP_UNKNOWN"
    NOT_PREPARED = "NOT_PREPARED"


class SyncError(Exception):
    """One clear sentence that says what, where and what to do."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, reason: Reason, message: str, **details: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.details = {name: str(value) for name, value in details.items()}


class InvalidRequest(SyncError):
    """The request itself is wrong: repeating it will not help."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class RankAlreadyDelivered(SyncError):
    """This rank, or this update id, came before with other content."""

    status = grpc.StatusCode.ALREADY_EXISTS


class NotKnown(SyncError):
    """No such update or manifest digest."""

    status = grpc.StatusCode.NOT_FOUND


class UpdateConflict(SyncError):
    """Ranks disagree, or another update is in hand: start over with a new update."""

    status = grpc.StatusCode.ABORTED


class UnsuitableEngine(SyncError):
    """The engine cannot take this update until something about it is changed."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class LimitExceeded(SyncError):
    """Larger, or more at a time, than this sidecar accepts."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unauthenticated(SyncError):
    """The caller brings no token that is known here."""

    status = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(SyncError):
    """The caller is known, and may not do this."""

    status = grpc.StatusCode.PERMISSION_DENIED


class Draining(SyncError):
    """The sidecar is stopping."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlinePassed(SyncError):
    """A wait ended; the message names the phase and whom it waited for."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class ChecksumsDiffer(SyncError):
    """The engine's weights are not what they must be after what was sent."""

    status = grpc.StatusCode.DATA_LOSS


class UpdateFailed(SyncError):
    """The update broke off after the engine was touched: the engine is dirty until the next complete update."""


class EngineError(SyncError):
    """A call to the engine did not succeed."""


class EngineUnreachable(EngineError):
    """The request never reached the engine."""

    status = grpc.StatusCode.UNAVAILABLE


class EngineDown(EngineUnreachable):
    """Nobody listens at its port: that server is gone, and one that answers there later is another."""


class EngineRefused(EngineError):
    """The engine answered no."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class EngineBusy(EngineError):
    """Requests are in flight, and the update is one that may not meet any."""

    status = grpc.StatusCode.ABORTED


class EngineLost(EngineError):
    """The request was sent and no answer came: whether it was carried out is unknown."""


class EngineTimeout(EngineLost):
    """The same, because its time was over: the engine may be at it still."""


class EngineRestarted(EngineError):
    """Another server answers than the one that the update began with; what it had loaded is gone."""

    status = grpc.StatusCode.ABORTED
