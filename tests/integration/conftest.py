"""Sidecars that several tests share, one per kind of engine, and those of a test's own."""

import gc
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import ScriptedEngine
from tests.fakes.shared_memory import files_of_this_process
from tests.integration.fleets import Trio
from tests.integration.support import SESSIONS, Pair

StartPair = Callable[..., Pair]


@pytest.fixture(autouse=True)
def _no_shared_memory_is_left() -> Iterator[None]:
    """Of this test: what one that failed has left is not held against those after it."""
    before = files_of_this_process()
    yield
    if files_of_this_process() - before:
        gc.collect()
        assert files_of_this_process() - before == set()


@pytest.fixture(scope="session")
def shared_pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Pair]]:
    started: dict[tuple[str, int], Pair] = {}
    with ExitStack() as stack:

        def get(release: str, tp_size: int) -> Pair:
            if (release, tp_size) not in started:
                engine = stack.enter_context(ScriptedEngine(release, tp_size))
                pair = Pair(engine, tmp_path_factory.mktemp("pair"))
                started[release, tp_size] = stack.enter_context(closing(pair))
                pair.wait_for(pb.SIDECAR_STATE_READY)
            return started[release, tp_size]

        yield get


@pytest.fixture
def pair(shared_pairs: Callable[[str, int], Pair], request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A ready sidecar that other tests use too: leave it ready. The parameter, if any, is the engine's release."""
    shared = shared_pairs(getattr(request, "param", SESSIONS), 2)
    shared.wait_for(pb.SIDECAR_STATE_READY)
    shared.mark()
    yield shared
    shared.engine.release()
    shared.forget_memory()
    shared.wait_for(pb.SIDECAR_STATE_READY)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartPair]:
    """Start a sidecar for this test alone; keywords go to the engine."""
    with ExitStack() as stack:

        def started(*args: str, release: str = SESSIONS, tp_size: int = 2, **engine: object) -> Pair:
            scripted = stack.enter_context(ScriptedEngine(release, tp_size, **engine))  # type: ignore[arg-type]
            pair = stack.enter_context(closing(Pair(scripted, tmp_path, args)))
            pair.wait_for(pb.SIDECAR_STATE_READY)
            return pair

        yield started


@pytest.fixture(scope="session")
def _engine_on_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        engine = stack.enter_context(ScriptedEngine("0.5.15.post1", 2, device="cuda"))
        for name in ("torch_1", "torch_9_8_0", "torch_9_8_1"):
            stack.enter_context(counters(name))
        pair = Pair(engine, tmp_path_factory.mktemp("cuda"))
        with closing(pair):
            pair.wait_for(pb.SIDECAR_STATE_READY)
            yield pair


@contextmanager
def counters(name: str) -> Iterator[Path]:
    """A file of torch's reference counters for CUDA memory: two exports, and a slot that is free."""
    file = Path("/dev/shm") / name
    file.write_bytes(bytes(64) + struct.pack("<3q", 1, 1, 0))
    try:
        yield file
    finally:
        file.unlink()


@pytest.fixture
def cuda_pair(_engine_on_gpus: Pair) -> Iterator[Pair]:
    _engine_on_gpus.mark()
    yield _engine_on_gpus
    _engine_on_gpus.forget_memory()


@pytest.fixture(scope="module")
def started_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with closing(Trio(tmp_path_factory.mktemp("trio"))) as trio:
        for pair in trio.pairs:
            pair.wait_for(pb.SIDECAR_STATE_READY)
        yield trio


@pytest.fixture
def trio(started_trio: Trio) -> Trio:
    """All serve version 0 of the test; POSTs count from here."""
    started_trio.heal()
    started_trio.mark()
    return started_trio
