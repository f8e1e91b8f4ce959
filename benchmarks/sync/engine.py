"""The server and the sidecars of one run.

Invariant: one sidecar at a time talks to the engine, and none while a peer is measured: a sidecar that sees versions
that are not its own takes the engine for one that was restarted.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from adapter.demo.cpu_engine import cpu_engine, cuda_engine
from adapter.engine_client import EngineClient
from adapter.launch import EngineConfig, SidecarConfig, SidecarProcess
from benchmarks.byte_counter import ByteCounter
from benchmarks.shapes import ModelShape

SESSIONS_SINCE = "/begin_weight_update"
_ASK_S = 20.0


def engine_config(shape: ModelShape, *, device: str, tp_size: int, folder: Path, log_path: Path) -> EngineConfig:
    """A server with random weights of this shape."""
    model = shape.write_config(folder / "model")
    if device == "cpu":
        config = cpu_engine(folder, model, tp_size=tp_size)
    else:  # SGLang's choice for experts wants kernels that must be compiled first
        extra = ("--moe-runner-backend", "triton") if shape.experts else ()
        config = cuda_engine(folder, model, tp_size=tp_size, extra_args=extra)
    return replace(config, log_path=log_path)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the peers' HTTP depends on."""

    url: str
    version: str
    uses_sessions: bool

    @classmethod
    def of(cls, url: str) -> "EngineFacts":
        """Ask the server: its release, and whether it has the routes of update sessions."""
        client = EngineClient(url)
        version = str(client.get("/server_info", _ASK_S)["version"])
        routes = client.get("/openapi.json", _ASK_S)["paths"]
        return cls(url, version, SESSIONS_SINCE in routes)

    def lives(self) -> bool:
        """Whether it still answers."""
        return EngineClient(self.url).answers()


@contextmanager
def sidecar(facts: EngineFacts, folder: Path, log_path: Path, *, replay: bool) -> Iterator[str]:
    """A sidecar beside the engine; where it listens."""
    target = f"unix:{folder}/sidecar.sock"
    args = () if replay else ("--no-replay",)
    with SidecarProcess(SidecarConfig(engine_url=facts.url, listen=target, log_path=log_path, args=args)):
        yield target


@dataclass(frozen=True, slots=True)
class Counted:
    """A sidecar whose every byte is counted."""

    targets: tuple[str, ...]
    """By rank."""
    grpc: tuple[ByteCounter, ...]
    """By rank."""
    http: ByteCounter

    def reset(self) -> None:
        """Count from here."""
        for counter in (*self.grpc, self.http):
            counter.reset()


@contextmanager
def counted_sidecar(
    facts: EngineFacts, folder: Path, log_path: Path, *, replay: bool, tp_size: int
) -> Iterator[Counted]:
    """A sidecar behind counters, one per rank, with a counter between it and the engine."""
    with ExitStack() as stack:
        http = stack.enter_context(ByteCounter(facts.url.removeprefix("http://"), "127.0.0.1:0"))
        behind = EngineFacts(f"http://127.0.0.1:{http.port}", facts.version, facts.uses_sessions)
        target = stack.enter_context(sidecar(behind, folder, log_path, replay=replay))
        targets = tuple(f"unix:{folder}/counted{rank}.sock" for rank in range(tp_size))
        grpc = tuple(stack.enter_context(ByteCounter(target, listen)) for listen in targets)
        yield Counted(targets, grpc, http)
