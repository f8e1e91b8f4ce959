"""A real SGLang server on GPUs, the sidecar beside it, and one trainer process per TP rank on the same GPUs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import requests

from adapter.demo.cpu_engine import cuda_engine
from adapter.demo.engine_http import EngineHttp
from adapter.launch import EngineConfig, EngineProcess, SidecarConfig, SidecarProcess
from adapter.sidecar_stub import SidecarStub
from tests.gpu.qwen3 import SHAPES, write_config

FIRST_ANSWER_TIMEOUT_S = 300


class Rank:
    """One of the trainer's processes; see ``tests.gpu.rank``."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.gpu.rank", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, **command: Any) -> None:
        """Give it a command, without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for its answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"trainer rank {self._process.args!r} died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, **command: Any) -> dict[str, Any]:
        """Both."""
        self.tell(**command)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it in order, if it lives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()


@dataclass(frozen=True)
class Ranks:
    """The whole trainer."""

    ranks: list[Rank]

    def all_do(self, **command: Any) -> list[dict[str, Any]]:
        """Give every rank a command, and wait for all answers."""
        for rank in self.ranks:
            rank.tell(**command)
        return [rank.answer() for rank in self.ranks]


@dataclass
class Setup:
    """Everything that a test needs."""

    stack: ExitStack
    config: EngineConfig
    server: EngineProcess
    sidecar: SidecarStub
    """What to ask the sidecar."""
    rank_arguments: list[str]
    """Of a rank, after its target and number."""
    ranks: Ranks = field(default_factory=lambda: Ranks([]))

    @property
    def engine(self) -> EngineHttp:
        """What to ask the server itself."""
        return EngineHttp(self.server.url)

    def start_rank(self, rank: int = 0) -> Rank:
        """A new trainer process; returns when it has its weights."""
        started = Rank(self.sidecar.target, str(rank), *self.rank_arguments)
        self.stack.callback(started.close)
        assert started.answer()["ready"]
        return started

    def num_loads(self) -> int:
        """How many buckets the server has answered, over its life."""
        return self.server.count_requests("POST", "/update_weights_from_tensor")

    def schedulers(self) -> list[int]:
        """The server's processes that hold the weights."""
        members = self.server.process.session_members()
        return [pid for pid in members if _command_line(pid).startswith("sglang::scheduler")]

    def kill_engine(self) -> None:
        """SIGKILL to every process of the server."""
        for pid in self.server.process.session_members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.server.stop()

    def restart_engine(self) -> None:
        """A new server at the same port."""
        self.server.stop()
        self.server = self.stack.enter_context(EngineProcess(replace(self.config, port=self.server.port)))

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Greedy token ids; the first call waits for kernels to be compiled."""
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        answer = requests.post(f"{self.engine.url}/generate", json=body, timeout=FIRST_ANSWER_TIMEOUT_S)
        answer.raise_for_status()
        tokens: list[int] = answer.json()["output_ids"]
        return tokens


@contextmanager
def running(folder: Path, *, shape: str, tp_size: int, bucket_bytes: int) -> Iterator[Setup]:
    """Start it all, and end it all."""
    with ExitStack() as stack:
        model = write_config(SHAPES[shape], folder / "model")
        config = cuda_engine(folder, model, tp_size=tp_size)
        server = stack.enter_context(EngineProcess(config))
        socket = f"unix:{folder}/sidecar.sock"
        log = folder / "sidecar.log"
        stack.enter_context(SidecarProcess(SidecarConfig(engine_url=server.url, listen=socket, log_path=log)))
        sidecar = SidecarStub(socket)
        stack.callback(sidecar.close)
        setup = Setup(stack, config, server, sidecar, [str(tp_size), shape, str(bucket_bytes)])
        setup.ranks.ranks.extend(setup.start_rank(rank) for rank in range(tp_size))
        yield setup


def _command_line(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def gpu_used_mib() -> int:
    """Of the first GPU, by everybody, as the driver says."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every tp_size that this machine's GPUs allow."""
    if "tp_size" in metafunc.fixturenames:
        metafunc.parametrize("tp_size", [size for size in (1, 2) if size <= max(1, _num_gpus())])


def _num_gpus() -> int:
    """Asked of the driver, so that this process does not open them; 0 without one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())
