"""``grpc.health.v1``: "" is whether the process lives, the service's name is whether it is ready.

Invariant: liveness never depends on the engine, or an orchestrator would restart a healthy sidecar with it.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from sidecar.servicer import SERVICE_NAME

LIVENESS = ""


MAX_WATCHERS = 1024


class WatchedHealth(HealthServicer):  # type: ignore[misc]  # untyped
    """Watchers that do not depend on each other: in grpcio-health-checking 1.85, one that leaves deafens the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Condition()
        self._watchers = 0

    async def tell(self) -> None:
        """Something has changed."""
        async with self._changed:
            self._changed.notify_all()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        """Send the state now and whenever it is another one, until the caller goes."""
        if self._watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} clients watch; use Check")
        self._watchers += 1
        try:
            await self._watch(request.service, context)
        finally:
            self._watchers -= 1

    async def _watch(self, service: str, context: Any) -> None:
        sent = None
        while True:
            now = self._now(service)
            if now != sent:
                await context.write(health_pb2.HealthCheckResponse(status=now))
                sent = now
            async with self._changed:  # never held while somebody reads slowly
                while self._now(service) == sent:
                    await self._changed.wait()

    def _now(self, service: str) -> int:
        return int(self._server_status.get(service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))


class Health:
    """What probes see."""

    def __init__(self) -> None:
        self.servicer = WatchedHealth()
        self._ready: bool | None = None

    async def set_ready(self, ready: bool) -> None:
        """Publish readiness, if it changed."""
        if ready == self._ready:
            return
        self._ready = ready
        serving = health_pb2.HealthCheckResponse.SERVING
        await self.servicer.set(SERVICE_NAME, serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.servicer.tell()

    async def drain(self) -> None:
        """NOT_SERVING for everything, for good."""
        await self.servicer.enter_graceful_shutdown()
        await self.servicer.tell()
