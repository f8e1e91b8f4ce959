"""One scripted engine and the sidecar's own objects beside it, in this process and on this event loop.

Everything is what ``sidecar.server`` puts together: engine client, watch, coordinator, LoRA loader, servicer and error
interceptor. Calls go through the interceptor's handlers with wire bytes, or through a real socket.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, cast

import grpc

from sidecar.config import AccessRules, Limits, Timeouts
from sidecar.coordinator import Coordinator
from sidecar.engine.lora import LoraEngine
from sidecar.engine.watch import EngineWatch
from sidecar.guard import Guard
from sidecar.interceptors import ErrorInterceptor, Handler
from sidecar.journal import Journal
from sidecar.lora_loader import LoraLoader
from sidecar.manifest_store import ManifestStore
from sidecar.replay import Replay
from sidecar.servicer import SERVICE_NAME, WeightSyncServicer
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.fakes import ScriptedEngine
from tests.fakes.replay import ReplayScript
from tests.fuzz.bodies import BodyCheck
from tests.fuzz.regions import Regions
from tests.fuzz.valid import CHECKPOINT_SHAPE, CHECKPOINT_TENSORS, Facts

TIMEOUTS = Timeouts(
    collect=0.5, pause=3.0, session=3.0, bucket=0.2, load=5.0, flush=0.3, verify=3.0, disk=5.0, publish=3.0, resume=3.0,
    probe=3.0, group=3.0, decide=0.3,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """What engine a world has."""

    name: str
    release: str = "0.5.23"
    tp_size: int = 2
    device: str = "cpu"
    info: Mapping[str, object] = field(default_factory=dict)
    has_checkpoint: bool = False
    replays: bool = False


KINDS = (
    Kind("checkpoint", has_checkpoint=True),
    Kind("sessions"),
    Kind("no-sessions", release="0.5.20", tp_size=1),
    Kind("gpus", release="0.5.15.post1", device="cuda"),
    Kind("two-hosts", device="cuda", info={"nnodes": 2}),
    Kind("replay", replays=True),
    Kind("replay-gpus", device="cuda", replays=True),
    Kind("lora", info={"enable_lora": True}),
    Kind("lora-old", release="0.5.15.post1", tp_size=1, info={"enable_lora": True}),
    Kind("draft", info={"speculative_algorithm": "EAGLE"}),
    Kind("eight", tp_size=8),
)


class Collector:
    """Takes the place of a gRPC server while the servicer is added to it."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same handlers once more."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        assert service == SERVICE_NAME
        self.handlers.update(handlers)


class World:
    """Made by ``running``."""

    def __init__(
        self, kind: Kind, engine: ScriptedEngine, facts: Facts, folder: Path, servicer: type[WeightSyncServicer]
    ) -> None:
        self.kind = kind
        self.facts = facts
        self.engine = engine
        self.handlers: dict[str, Handler] = {}
        self.parsers: dict[str, Any] = {}
        client = LoraEngine(engine.url, TIMEOUTS)
        listen = f"unix:{folder}/{kind.name}.sock"
        self.replay = Replay(listen, enabled=True)
        self.coordinator = Coordinator(client, TIMEOUTS, journal=Journal(folder / "journal"), replay=self.replay)
        self.watch = EngineWatch(client, self.coordinator.engine_changed)
        self.client = client
        self.target = listen
        self.channel: grpc.aio.Channel | None = None
        loader = LoraLoader(client, TIMEOUTS, self.coordinator)
        self._servicer = servicer(self.coordinator, self.watch, loader, ManifestStore(), TIMEOUTS, Limits())
        self._interceptor, self._guard = ErrorInterceptor(), Guard(AccessRules(), max_open_calls=4096)
        model_path = str(facts.folder) if kind.has_checkpoint else "/models/tiny-qwen3"
        self.bodies = BodyCheck(kind.tp_size, kind.release != "0.5.15.post1", model_path)

    async def start(self) -> grpc.aio.Server:
        """Serve on a socket, and make the handlers for calls in process."""
        collector = Collector()
        pb_grpc.add_WeightSyncServiceServicer_to_server(self._servicer, cast("grpc.aio.Server", collector))
        for name, handler in collector.handlers.items():
            self.parsers[name] = handler.request_deserializer
            self.handlers[name] = await self._wrapped(name, handler)
        server = grpc.aio.server(interceptors=[self._interceptor, self._guard])
        pb_grpc.add_WeightSyncServiceServicer_to_server(self._servicer, server)
        server.add_insecure_port(self.target)
        await server.start()
        self.channel = grpc.aio.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)])
        await self.watch.look()
        assert self.client.info is not None, "the scripted engine answers"
        return server

    def check_engine(self) -> list[str]:
        """What reached the engine since the last look and must not have; and whether it died of it."""
        calls, findings = self.engine.calls[:], []
        del self.engine.calls[: len(calls)]
        for call in calls:
            try:
                self.bodies.check(call)
            except Exception as error:  # noqa: BLE001 - whatever a body makes the check do is a finding
                findings.append(f"{self.kind.name}: {call.path} {type(error).__name__}: {str(error)[:300]}")
        if not self.engine.alive:
            findings.append(f"{self.kind.name}: the engine died: {self.engine.cause_of_death}")
            self.engine.restart()
        self.engine.forget_plans()
        return findings

    async def _wrapped(self, name: str, handler: Handler) -> Handler:
        async def known(_: grpc.HandlerCallDetails) -> Handler:
            return handler

        async def guarded(details: grpc.HandlerCallDetails) -> Handler | None:
            return await self._guard.intercept_service(known, details)

        details = cast("grpc.HandlerCallDetails", _Details(f"/{SERVICE_NAME}/{name}"))
        wrapped = await self._interceptor.intercept_service(guarded, details)
        assert wrapped is not None
        return wrapped


@dataclass(frozen=True, slots=True)
class _Details:
    method: str
    invocation_metadata: tuple[object, ...] = ()


@asynccontextmanager
async def running(
    kind: Kind, folder: Path, servicer: type[WeightSyncServicer] = WeightSyncServicer
) -> AsyncIterator[World]:
    """A world whose engine has been seen."""
    folder = folder / kind.name
    model = write_checkpoint(folder / "model")
    with ExitStack() as stack:
        regions = stack.enter_context(Regions(kind.device, folder))
        engine = stack.enter_context(_engine(kind, model))
        facts = Facts(kind.tp_size, regions.handle, kind.has_checkpoint, str(model), engine.port)
        world = World(kind, engine, facts, folder, servicer)
        server = await world.start()
        watching = asyncio.create_task(world.watch.run())
        try:
            yield world
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await _stop(world, server)


async def _stop(world: World, server: grpc.aio.Server) -> None:
    assert world.channel is not None
    await world.channel.close()
    await server.stop(0)
    world.client.close()
    world.replay.close()


def _engine(kind: Kind, model: Path) -> ScriptedEngine:
    info: dict[str, Any] = dict(kind.info)
    if kind.has_checkpoint:
        info["model_path"] = str(model)
    script = ReplayScript() if kind.replays else None
    if script is not None:
        script.headers = _Forgetful()
    return ScriptedEngine(
        kind.release, kind.tp_size, device=kind.device, known_names=CHECKPOINT_TENSORS, server_info=info, replay=script
    )


class _Forgetful(list[dict[str, Any]]):
    """What the scripted loaders record would be the only thing here that grows."""

    def append(self, _: dict[str, Any]) -> None:
        """Let it go."""


def write_checkpoint(folder: Path) -> Path:
    """A model folder with a safetensors header, whose tensors are zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    size = 4 * prod(CHECKPOINT_SHAPE)
    header = {
        name: {"dtype": "F32", "shape": CHECKPOINT_SHAPE, "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(CHECKPOINT_TENSORS)
    }
    written = json.dumps(header).encode()
    content = struct.pack("<Q", len(written)) + written + bytes(size * len(CHECKPOINT_TENSORS))
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    return folder
