"""A real SGLang server on GPUs, the sidecar beside it, and one trainer process per TP rank on the same GPUs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from adapter.demo.cpu_engine import cuda_engine
from adapter.demo.engine_http import EngineHttp
from adapter.launch import EngineProcess, SidecarConfig, SidecarProcess
from tests.gpu.qwen3 import SHAPES, write_config

FIRST_ANSWER_TIMEOUT_S = 300


@dataclass
class Ranks:
    """The trainer's processes."""

    processes: Sequence[subprocess.Popen[str]]

    def all_do(self, **command: Any) -> list[dict[str, Any]]:
        """Give every rank a command, and wait for all answers."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self.processes]

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"trainer rank {process.args!r} died"
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Setup:
    """Everything that a test needs."""

    engine: EngineHttp
    ranks: Ranks
    socket: str

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
        engine = stack.enter_context(EngineProcess(config))
        socket = f"unix:{folder}/sidecar.sock"
        log = folder / "sidecar.log"
        stack.enter_context(SidecarProcess(SidecarConfig(engine_url=engine.url, listen=socket, log_path=log)))
        processes = [stack.enter_context(_rank(socket, rank, tp_size, shape, bucket_bytes)) for rank in range(tp_size)]
        ranks = Ranks(processes)
        for process in processes:
            ranks._answer(process)
        yield Setup(EngineHttp(engine.url), ranks, socket)


@contextmanager
def _rank(socket: str, rank: int, tp_size: int, shape: str, bucket_bytes: int) -> Iterator[subprocess.Popen[str]]:
    arguments = [socket, str(rank), str(tp_size), shape, str(bucket_bytes)]
    command = [sys.executable, "-m", "tests.gpu.rank", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


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
