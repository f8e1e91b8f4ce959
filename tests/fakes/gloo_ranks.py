"""Trainer ranks in processes of their own, with a real gloo group, for tests of what needs several.

Owns the processes: started once, asked many times, ended by their owner. Invariant: every call is answered by every
rank within its deadline, or the test fails.
"""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

START_S = 120.0
ANSWER_S = 60.0

Result = TypeVar("Result")


class GlooRanks:
    """As many ranks as there are connections."""

    def __init__(self, connections: "list[Connection[Any, Any]]") -> None:
        self._connections = connections

    def __len__(self) -> int:
        return len(self._connections)

    def call(self, function: Callable[..., Result], *arguments: object) -> list[Result]:
        """Run ``function(*arguments)``, a module's own function, on every rank at once; what they return, by rank."""
        for connection in self._connections:
            connection.send((function, arguments))
        return [self._answer(rank) for rank in range(len(self))]

    def _answer(self, rank: int) -> Any:
        connection = self._connections[rank]
        assert connection.poll(ANSWER_S), f"rank {rank} said nothing within {ANSWER_S} s"
        failed, answer = connection.recv()
        assert not failed, f"rank {rank}:\n{answer}"
        return answer


@contextmanager
def gloo_ranks(num_ranks: int, folder: Path) -> Iterator[GlooRanks]:
    """Ranks of one group, ended with the block."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(num_ranks)]
    processes = [
        context.Process(target=_serve, args=(theirs, rank, num_ranks, str(folder / "store")))
        for rank, (_, theirs) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    try:
        for ours, _ in ends:
            assert ours.poll(START_S), "a rank did not start"
            assert ours.recv() == "ready"
        yield GlooRanks([ours for ours, _ in ends])
    finally:
        for ours, _ in ends:
            ours.close()
        for process in processes:
            process.join(10)
            process.kill()
            process.join()


def _serve(commands: "Connection[Any, Any]", rank: int, num_ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    commands.send("ready")
    while True:
        try:
            function, arguments = commands.recv()
        except EOFError:
            return
        commands.send(_answer(function, arguments))


def _answer(function: Callable[..., object], arguments: tuple[object, ...]) -> tuple[bool, object]:
    try:
        return False, function(*arguments)
    except BaseException:  # noqa: BLE001 - the test's process raises it again
        return True, traceback.format_exc()
