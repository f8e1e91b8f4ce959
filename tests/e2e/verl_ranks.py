"""Trainer ranks with a VerlEngine as a test sees them: processes that are told what to call, and what they leave.

Invariant: ranks are ended with their block; every wait has a deadline.
"""

import contextlib
import json
import multiprocessing
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from adapter.demo import tiny_model
from adapter.demo.cpu_engine import cpu_engine
from adapter.launch import ManagedProcess
from adapter.launch.engine import SHARED_MEMORY_PREFIXES
from adapter.launch.reaper import shared_memory_of

START_S = 240.0  # two servers that start at once share the cores
ANSWER_S = 120.0
PROMPT = (11, 42, 7)
# The flags of ``cpu_engine``, as keyword arguments.
CPU_SERVER_ARGS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "skip_server_warmup": True,
    "disable_overlap_schedule": True,
    "sampling_backend": "pytorch",
    "device": "cpu",
    "attention_backend": "torch_native",
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.1,
    "sleep_on_idle": True,
}


def engine_arguments(folder: Path, tp_size: int, **more: Any) -> dict[str, Any]:
    """Arguments of a VerlEngine on the CPU, as JSON has them."""
    model = tiny_model.write_config(folder / "model")
    config = cpu_engine(folder, model, tp_size=tp_size)
    started = {"env": dict(config.env), "pythonpath": [str(path) for path in config.pythonpath]}
    return {"model_path": str(model), **CPU_SERVER_ARGS, **started, **more}


def greedy(num_tokens: int = 8, **more: Any) -> dict[str, Any]:
    """Arguments of ``generate``."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"input_ids": list(PROMPT), "sampling_params": sampling, **more}


@dataclass(frozen=True, slots=True)
class Failure:
    """What a call raised."""

    kind: str
    message: str


class VerlRank:
    """One rank in a process of its own."""

    def __init__(
        self, rank: int, size: int, folder: Path, store: Path | None, program: str = "tests.e2e.verl_rank"
    ) -> None:
        self.rank = rank
        self._commands, theirs = multiprocessing.Pipe()
        options = ["--fd", str(theirs.fileno()), "--rank", str(rank), "--size", str(size)]
        with theirs:
            self.process = ManagedProcess(
                f"rank {rank}",
                [sys.executable, "-m", program, *options, *(["--store", str(store)] if store else [])],
                folder / f"rank-{rank}.log",
                grace_s=60.0,
                pass_fds=[theirs.fileno()],
            )

    def tell(self, do: str, engine: str = "engine", **command: Any) -> None:
        """Returns at once."""
        self._commands.send_bytes(json.dumps({"do": do, "engine": engine, **command}).encode())

    def hear(self, timeout_s: float) -> Any:
        """What the last command gave, or a ``Failure``."""
        assert self._commands.poll(timeout_s), f"rank {self.rank} said nothing; its log:\n{self.process.log_text()}"
        answer = json.loads(self._commands.recv_bytes())
        return Failure(*answer["error"]) if "error" in answer else answer["value"]

    def call(self, do: str, timeout_s: float = ANSWER_S, **arguments: Any) -> Any:
        """This rank alone."""
        self.tell(do, arguments=arguments)
        return self.hear(timeout_s)

    def end(self) -> None:
        """Closing its socket lets it end in good order."""
        self._commands.close()
        self.process.wait_exit(60.0)
        self.process.stop()


@contextlib.contextmanager
def verl_ranks(
    folder: Path, size: int = 2, *, mesh: bool = True, program: str = "tests.e2e.verl_rank"
) -> Iterator[list[VerlRank]]:
    """Ended with the block."""
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(size):
            ranks.append(VerlRank(rank, size, folder, folder / "store" if mesh else None, program))
            stack.callback(ranks[-1].end)
        yield ranks


class KeptRanks:
    """Ranks for one test after the other: their imports take many seconds.

    A test that fails may leave them out of step, so the next one gets new ones.
    """

    def __init__(self, start: Callable[[], contextlib.AbstractContextManager[list[VerlRank]]]) -> None:
        self._start = start
        self._started = contextlib.ExitStack()
        self._ranks: list[VerlRank] | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[list[VerlRank]]:
        """Left running, unless the block raises."""
        if self._ranks is None:
            self._ranks = self._started.enter_context(self._start())
        try:
            yield self._ranks
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends them."""
        self._ranks = None
        self._started.close()


def on_all(ranks: Sequence[VerlRank], do: str, timeout_s: float = ANSWER_S, **command: Any) -> list[Any]:
    """All ranks at once; ``command`` may hold one of its values per rank, as a function of the rank."""
    for rank in ranks:
        rank.tell(do, **{name: value(rank.rank) if callable(value) else value for name, value in command.items()})
    return [rank.hear(timeout_s) for rank in ranks]


def call_all(ranks: Sequence[VerlRank], do: str, **arguments: Any) -> list[Any]:
    """All ranks at once, with the same arguments."""
    return on_all(ranks, do, arguments=arguments)


def make_all(ranks: Sequence[VerlRank], arguments: dict[str, Any] | Callable[[int], dict[str, Any]]) -> list[Any]:
    """All ranks make their engine."""
    return on_all(ranks, "make", START_S, arguments=arguments)


def update_all(ranks: Sequence[VerlRank], seed: int, **arguments: Any) -> list[Any]:
    """All ranks send that seed's weights."""
    return on_all(ranks, "update", seed=seed, arguments=arguments)


@dataclass(frozen=True, slots=True)
class Belongings:
    """What an engine occupies on this machine."""

    processes: tuple[psutil.Process, ...]
    shared_memory: frozenset[str]
    port: int
    paths: tuple[Path, ...]

    def left(self) -> list[str]:
        """What of it is still there."""
        processes = [f"{process}" for process in self.processes if _lives(process)]
        memory = [name for name in self.shared_memory if (Path("/dev/shm") / name).exists()]
        with socket.socket() as probe:
            listens = [f"port {self.port}"] if probe.connect_ex(("127.0.0.1", self.port)) == 0 else []
        return processes + memory + listens + [str(path) for path in self.paths if path.exists()]

    def wait_until_gone(self, timeout_s: float) -> list[str]:
        """What is left after so long at most."""
        give_up = time.monotonic() + timeout_s
        while (left := self.left()) and time.monotonic() < give_up:
            time.sleep(0.2)
        return left


def belongings(rank: VerlRank, described: dict[str, Any], *, keeps_logs: bool = False) -> Belongings:
    """What the rank has started: all below it that is not of its own session, nor torch's helper."""
    own_session = rank.process.session_members()
    below = [child for child in psutil.Process(rank.process.pid).children(recursive=True) if _lives(child)]
    processes = tuple(child for child in below if child.pid not in own_session and child.name() != "torch_shm_manager")
    names = shared_memory_of([process.pid for process in processes], SHARED_MEMORY_PREFIXES)
    assert len(processes) >= 4, "a server has at least two processes, a sidecar and a reaper come with it"
    assert any(name.startswith(("sgl_shm_", "sglang_loads_")) for name in names)
    socket_path = Path(described["sidecar_target"].removeprefix("unix:"))
    paths = (socket_path,) if keeps_logs else (socket_path.parent, Path(described["server_log"]).parent)
    port = urlsplit(described["server_url"]).port
    assert port is not None
    return Belongings(processes, frozenset(names), port, paths)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
