"""The life of the process: startup, serving, drain.

    startup -> serving until SIGTERM or SIGINT -> drain -> exit 0
    drain: NOT_SERVING -> lame duck (lame_duck_s) -> no new update -> the update in hand ends (at most drain_s)
           -> stop gRPC -> close HTTP
    a second signal ends the drain at once, and exits with 1; so does an update that outlasts the drain

Invariant: the port is served within the process's first moments, whether the engine is up or not.
"""

import asyncio
import logging
import os
import signal
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar.config import Address, ServeConfig
from sidecar.coordinator import Coordinator
from sidecar.engine.info import EngineInfo
from sidecar.engine.lora import LoraEngine
from sidecar.engine.watch import EngineWatch
from sidecar.guard import Guard
from sidecar.health import Health
from sidecar.interceptors import ErrorInterceptor
from sidecar.journal import Journal
from sidecar.listening import claim_engine, listen
from sidecar.lora_loader import LoraLoader
from sidecar.manifest_store import ManifestStore
from sidecar.metrics import CONTENT_TYPE, Metrics
from sidecar.probes import Answer, ProbeServer, Query
from sidecar.replay import Replay
from sidecar.servicer import SERVICE_NAME, WeightSyncServicer
from sidecar.standing import SidecarState
from sidecar.tracing import spans_of
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
KEEPALIVE_MS = 10_000


class SidecarServer:
    """One sidecar; ``run`` is its whole life."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._engine = LoraEngine(config.engine_url, config.timeouts, config.gpu_uuids, config.engine_keys)
        self._metrics = Metrics()
        self._replay = Replay(str(config.listen), enabled=config.replay)
        self._coordinator = Coordinator(
            self._engine,
            config.timeouts,
            self._changed,
            self._metrics.ended,
            Journal(config.journal),
            replay=self._replay,
            accept_checkpoint=config.accept_checkpoint,
            require_update=config.require_update,
            spans=spans_of(os.environ),
        )
        self._metrics.watch(_Present(self._coordinator))
        self._lora = LoraLoader(self._engine, config.timeouts, self._coordinator)
        self._watch = EngineWatch(self._engine, self._coordinator.engine_changed)
        self._health = Health()
        self._probes = ProbeServer({"/livez": self._livez, "/readyz": self._readyz, "/metrics": self._exposition})
        self._state_changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._server = self._make_server()

    async def run(self) -> bool:
        """Serve until told to stop; whether no update was left half-way. Raises ``AddressInUseError`` at the start."""
        await self._startup()
        async with asyncio.TaskGroup() as background:
            tasks = [background.create_task(self._watch.run()), background.create_task(self._publish_readiness())]
            await self._stop.wait()
            clean = await self._drain()
            for task in tasks:
                task.cancel()
        return clean

    def stop(self) -> None:
        """Begin to drain; a second call ends the drain at once."""
        if self._stop.is_set():
            self._engine.close()
            raise SystemExit(1)
        self._stop.set()

    async def _startup(self) -> None:
        address: Address = listen(self._server, self._config.listen, self._config.tls)
        self._engine_claim = claim_engine(self._config.engine_url)
        if self._config.is_exposed and not self._config.is_guarded:
            logger.warning("%s is open (--insecure): every host that reaches it may change the weights", address)
        await self._health.set_ready(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        if self._config.http_listen is not None:
            logger.info("probes and metrics on http://%s", await self._probes.start(self._config.http_listen))
        await self._server.start()
        logger.info("serving on %s beside the engine at %s", address, self._config.engine_url)

    async def _drain(self) -> bool:
        logger.info("stopping: no new update; %.0f s for the one in hand", self._config.drain_s)
        await self._health.drain()
        await asyncio.sleep(self._config.lame_duck_s)
        seconds = self._config.drain_s
        clean, _ = await asyncio.gather(self._coordinator.drain(seconds), self._lora.drain(seconds))
        if not clean:
            logger.error("stopping in the middle of an update: the engine is left paused, with mixed weights")
        if clean:  # else its callers must not be told that it took nothing: their connections break
            await self._server.stop(STOP_GRACE_S)
        self._probes.close()
        self._engine.close()
        self._replay.close()
        return clean

    async def _publish_readiness(self) -> None:
        while True:
            await self._health.set_ready(self._coordinator.standing.ready)
            await self._state_changed.wait()
            self._state_changed.clear()

    def _livez(self, _: Query) -> Answer:
        return Answer(b"alive\n")

    def _readyz(self, query: Query) -> Answer:
        """In one word; the reason is told by ``status``, to those who may look."""
        standing = self._coordinator.standing
        if standing.ready and query.get("version", standing.weight_version) != standing.weight_version:
            return Answer(b"another_version\n", 503)
        if standing.ready and not self._stop.is_set():
            return Answer(f"{standing.state.name.lower()}\n".encode())
        word = "not_ready" if standing.state is SidecarState.READY else standing.state.name.lower()
        return Answer(f"{word}\n".encode(), 503)

    def _exposition(self, _: Query) -> Answer:
        return Answer(self._metrics.exposition(), content_type=CONTENT_TYPE)

    def _changed(self) -> None:
        self._state_changed.set()

    def _make_server(self) -> grpc.aio.Server:
        options = [
            ("grpc.so_reuseport", 0),  # a second sidecar on the port must fail, not share it
            ("grpc.max_receive_message_length", self._config.limits.message_bytes),
            # A caller whose host or link has gone says nothing: its lease ends when it does not answer any more.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ]
        guard = Guard(self._config.access, self._config.limits.open_calls)
        server = grpc.aio.server(interceptors=[ErrorInterceptor(self._metrics), guard], options=options)
        servicer = WeightSyncServicer(
            self._coordinator, self._watch, self._lora, ManifestStore(), self._config.timeouts, self._config.limits
        )
        pb_grpc.add_WeightSyncServiceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection([SERVICE_NAME, health_name, reflection.SERVICE_NAME], server)
        return server


class _Present:
    """What stands now, for the metrics."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    @property
    def state(self) -> SidecarState:
        return self._coordinator.standing.state

    @property
    def ready(self) -> bool:
        return self._coordinator.standing.ready

    @property
    def engine(self) -> EngineInfo | None:
        return self._coordinator.engine

    @property
    def epoch(self) -> int:
        return self._coordinator.epoch

    @property
    def weight_version(self) -> str:
        return self._coordinator.standing.weight_version

    @property
    def in_hand_s(self) -> float:
        current = self._coordinator.current
        return time.monotonic() - current.started if current else 0.0


def serve(config: ServeConfig) -> bool:
    """Run one sidecar in this thread until a signal ends it; whether no update was left half-way."""

    async def life() -> bool:
        return await SidecarServer(config).run()

    try:
        return asyncio.run(life())
    except (SystemExit, asyncio.CancelledError):  # a second signal
        return False
