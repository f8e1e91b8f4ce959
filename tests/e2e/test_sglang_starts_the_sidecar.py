"""One command: SGLang's own --sidecar brings the sidecar up and takes it down."""

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

import sidecar
from adapter.demo import tiny_model
from adapter.demo.cpu_engine import cpu_engine
from adapter.demo.engine_http import EngineHttp
from adapter.demo.trainers import trainer_ranks, update_all
from adapter.launch import EngineConfig, EngineProcess, free_port, sidecar_is_serving
from tests.e2e.engines import READY_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MAX_RSS_BYTES = 80_000_000


@dataclass(frozen=True, slots=True)
class Embedded:
    """A server that has started the sidecar itself."""

    engine: EngineProcess
    listen: str
    workdir: Path

    def sidecar_pid(self) -> int:
        """The child as SGLang's log names it."""
        named = re.search(r"Sidecar module sidecar started pid=(\d+)", self.engine.process.log_text())
        assert named
        return int(named[1])


def config_with_sidecar(workdir: Path, listen: str) -> EngineConfig:
    port = free_port()
    serve = ["serve", "--engine-url", f"http://127.0.0.1:{port}", "--listen", listen]
    grpc = ("--grpc-port", str(free_port()), "--sidecar", "sidecar", "--sidecar-args", json.dumps(serve))
    home = Path(sidecar.__file__).parents[1]
    config = cpu_engine(workdir, tiny_model.write_config(workdir / "model"), extra_args=grpc, pythonpath=(home,))
    return replace(config, port=port, ready_timeout_s=READY_S)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    workdir = tmp_path_factory.mktemp("embedded")
    listen = f"unix:{workdir / 's.sock'}"
    with EngineProcess(config_with_sidecar(workdir, listen)) as engine:
        engine.process.wait_until(lambda: sidecar_is_serving(listen), 60.0)
        yield Embedded(engine, listen, workdir)


def test_an_update_goes_through(embedded: Embedded) -> None:
    http = EngineHttp(embedded.engine.url)
    before = http.generate((11, 42, 7), 8)
    with trainer_ranks(embedded.listen, ["cpu"], embedded.workdir) as ranks:
        reports = update_all(ranks, 1, "v1")
    assert [report.error for report in reports] == [""]
    assert http.generate((11, 42, 7), 8) != before
    assert http.weight_version() == "v1"


def test_the_sidecar_is_the_child_that_sglang_started_and_is_small(embedded: Embedded) -> None:
    process = psutil.Process(embedded.sidecar_pid())
    assert process.ppid() == embedded.engine.pid
    rss = process.memory_info().rss
    print(f"the sidecar under SGLang has {rss / 1e6:.0f} MB resident")
    assert rss < MAX_RSS_BYTES


def test_the_sidecar_ends_with_the_server(embedded: Embedded) -> None:
    """Last in this file: it ends the server."""
    process = psutil.Process(embedded.sidecar_pid())
    os.kill(embedded.engine.pid, signal.SIGTERM)
    assert embedded.engine.process.wait_exit(60.0)
    gone, alive = psutil.wait_procs([process], timeout=5)
    assert gone
    assert not alive
    assert not sidecar_is_serving(embedded.listen)
