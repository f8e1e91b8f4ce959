"""``grpc.health.v1``: "" is whether the process lives, the service's name is whether it is ready.

Invariant: liveness never depends on the engine, or an orchestrator would restart a healthy sidecar with it.
"""

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from sidecar.servicer import SERVICE_NAME

LIVENESS = ""


class Health:
    """What probes see."""

    def __init__(self) -> None:
        self.servicer = HealthServicer()
        self._ready: bool | None = None

    async def set_ready(self, ready: bool) -> None:
        """Publish readiness, if it changed."""
        if ready == self._ready:
            return
        self._ready = ready
        serving = health_pb2.HealthCheckResponse.SERVING
        await self.servicer.set(SERVICE_NAME, serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """NOT_SERVING for everything, for good."""
        await self.servicer.enter_graceful_shutdown()
