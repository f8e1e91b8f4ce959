"""One rank's calls to its sidecar: a lazily opened channel, a deadline on every call, typed errors.

Invariant: nothing but ``adapter.errors`` leaves, and no call waits longer than it was told to.
"""

import os
import time
from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

import grpc

from adapter import traces
from adapter.credentials import NO_CREDENTIALS, Credentials
from adapter.errors import EngineUnreachable, IncompatibleSidecar, SidecarUnreachable, from_rpc_error
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

QUERY_TIMEOUT_S = 10.0
# A proxy from the environment must not see calls that stay on this host.
NO_PROXY = (("grpc.enable_http_proxy", 0),)
READY_POLL_S = 0.2
RESTART_PATIENCE_S = 30.0

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
Request = TypeVar("Request", contravariant=True)
Answer = TypeVar("Answer")
Response = TypeVar("Response", covariant=True)


class Method(Protocol[Request, Response]):
    """A unary method of the generated stub."""

    def __call__(self, request: Request, /, timeout: float | None = None, metadata: Metadata | None = None) -> Response:
        """Call it and wait."""


class SidecarStub:
    """The channel of one process to one sidecar; the trainer's thread opens it at its first call."""

    def __init__(
        self,
        target: str,
        credentials: Credentials = NO_CREDENTIALS,
        restart_patience_s: float = RESTART_PATIENCE_S,
    ) -> None:
        self.target = target
        self._credentials = credentials
        self._patience_s = restart_patience_s
        self._answered = False
        """Whether the sidecar ever did: one that never has is not waited for."""
        self._channel: grpc.Channel | None = None
        self._rpc: pb_grpc.WeightSyncServiceStub | None = None
        self._pid = 0
        self._capabilities: pb.GetCapabilitiesResponse | None = None

    @property
    def rpc(self) -> pb_grpc.WeightSyncServiceStub:
        """The generated stub. gRPC does not survive a fork, so a child gets a channel of its own."""
        if self._rpc is None or self._pid != os.getpid():
            self._channel = self._credentials.channel(self.target, NO_PROXY)
            self._rpc = pb_grpc.WeightSyncServiceStub(self._channel)
            self._pid = os.getpid()
        return self._rpc

    def call(self, method: Method[Request, Response], request: Request, timeout_s: float) -> Response:
        """One call with a deadline; raises ``WeightSyncError``."""
        try:
            response = method(request, timeout=timeout_s, metadata=traces.metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error
        self._answered = True
        return response

    def across_restarts(self, call: Callable[[float], Answer], timeout_s: float) -> Answer:
        """``call``, given the seconds that are left; made again while the sidecar is being restarted.

        Only where the sidecar took nothing of it. Raises what ``call`` raises.
        """
        started = time.monotonic()
        patience_s = min(self._patience_s, timeout_s)
        while True:
            try:
                return call(started + timeout_s - time.monotonic())
            except SidecarUnreachable as error:
                waited_s = time.monotonic() - started
                if not (self._answered and error.took_nothing) or waited_s + READY_POLL_S > patience_s:
                    raise
            time.sleep(READY_POLL_S)

    def status(self) -> pb.GetStatusResponse:
        """What the sidecar is doing."""
        return self.call(self.rpc.GetStatus, pb.GetStatusRequest(), QUERY_TIMEOUT_S)

    def find_update(self, update_id: str) -> pb.GetUpdateResponse:
        """How one of the last updates went or goes."""
        return self.call(self.rpc.GetUpdate, pb.GetUpdateRequest(update_id=update_id), QUERY_TIMEOUT_S)

    def capabilities(self) -> pb.GetCapabilitiesResponse:
        """What sidecar and engine can do; asked once, as soon as the engine has been seen."""
        if self._capabilities is None or not self._capabilities.HasField("engine"):
            request = pb.GetCapabilitiesRequest()
            self._capabilities = self.call(self.rpc.GetCapabilities, request, QUERY_TIMEOUT_S)
        return self._capabilities

    def has(self, feature: pb.Feature.ValueType) -> bool:
        """Whether the sidecar's protocol has ``feature``."""
        return feature in self.capabilities().features

    def require(self, feature: pb.Feature.ValueType) -> None:
        """Raise ``IncompatibleSidecar`` if the sidecar's protocol lacks ``feature``."""
        if not self.has(feature):
            name = pb.Feature.Name(feature).removeprefix("FEATURE_").lower()
            version = self.capabilities().sidecar_version
            raise IncompatibleSidecar(f"the sidecar at {self.target} ({version}) cannot do {name}; upgrade it")

    def wait_ready(self, timeout_s: float) -> None:
        """Until the sidecar answers and sees its engine; raises the last reason why not."""
        give_up = time.monotonic() + timeout_s
        while (problem := self._not_ready()) is not None:
            if time.monotonic() + READY_POLL_S > give_up:
                raise problem
            time.sleep(READY_POLL_S)

    def _not_ready(self) -> Exception | None:
        try:
            status = self.status()
        except SidecarUnreachable as error:
            return error
        if status.state == pb.SIDECAR_STATE_ENGINE_UNREACHABLE:
            return EngineUnreachable(f"the sidecar at {self.target} waits for its engine: {status.reason}")
        return None

    def close(self) -> None:
        """Close the channel; calls in flight end."""
        if self._channel is not None and self._pid == os.getpid():
            self._channel.close()
        self._channel = self._rpc = None
