"""One rank's calls to its sidecar: a lazily opened channel, a deadline on every call, typed errors.

Invariant: nothing but ``adapter.errors`` leaves, and no call waits longer than it was told to.
"""

import os
import time
from typing import Protocol, TypeVar

import grpc

from adapter.errors import EngineUnreachable, IncompatibleSidecar, SidecarUnreachable, from_rpc_error
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

QUERY_TIMEOUT_S = 10.0
# A proxy from the environment must not see calls that stay on this host.
NO_PROXY = (("grpc.enable_http_proxy", 0),)
READY_POLL_S = 0.2

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


class Method(Protocol[Request, Response]):
    """A unary method of the generated stub."""

    def __call__(self, request: Request, /, timeout: float | None = None) -> Response:
        """Call it and wait."""


class SidecarStub:
    """The channel of one process to one sidecar; the trainer's thread opens it at its first call."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel: grpc.Channel | None = None
        self._rpc: pb_grpc.WeightSyncServiceStub | None = None
        self._pid = 0
        self._connectivity: grpc.ChannelConnectivity | None = None
        self._capabilities: pb.GetCapabilitiesResponse | None = None

    @property
    def rpc(self) -> pb_grpc.WeightSyncServiceStub:
        """The generated stub. gRPC does not survive a fork, so a child gets a channel of its own."""
        if self._rpc is None or self._pid != os.getpid():
            self._channel = grpc.insecure_channel(self.target, options=NO_PROXY)
            self._connectivity = None
            self._channel.subscribe(self._connectivity_changed)
            self._rpc = pb_grpc.WeightSyncServiceStub(self._channel)
            self._pid = os.getpid()
        return self._rpc

    @property
    def is_connected(self) -> bool:
        """Whether the sidecar was there a moment ago; without asking it."""
        return self._connectivity is grpc.ChannelConnectivity.READY and self._pid == os.getpid()

    def _connectivity_changed(self, state: grpc.ChannelConnectivity) -> None:
        """Called by a thread of gRPC's."""
        self._connectivity = state

    def call(self, method: Method[Request, Response], request: Request, timeout_s: float) -> Response:
        """One call with a deadline; raises ``WeightSyncError``."""
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error

    def status(self) -> pb.GetStatusResponse:
        """What the sidecar is doing."""
        return self.call(self.rpc.GetStatus, pb.GetStatusRequest(), QUERY_TIMEOUT_S)

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
