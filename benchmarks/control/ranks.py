"""The control benchmark's trainer: as many processes as ranks, forked from one that has imported everything.

Invariant: every answer is waited for and bounded; ``close`` leaves no process behind.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.control.rank import Answer, Settings, serve

START_S = 120.0
ANSWER_S = 90.0
LEAD_S = 0.05
LEAD_PER_RANK_S = 0.005
"""From the order to the start: every rank must have been scheduled once, to read it."""


class ControlRanks:
    """Rank by rank, a pipe."""

    def __init__(self, connections: "list[Connection[Any, Any]]") -> None:
        self._connections = connections

    def __len__(self) -> int:
        return len(self._connections)

    def do(self, name: str, **arguments: Any) -> list[Answer]:
        """One command for all; their answers by rank. Raises ``RuntimeError``."""
        for connection in self._connections:
            connection.send((name, arguments))
        return [self._answer(rank, ANSWER_S) for rank in range(len(self))]

    def at_once(self, name: str, **arguments: Any) -> tuple[float, list[Answer]]:
        """The same, begun at one moment, which is told."""
        at = self._soon()
        return at, self.do(name, at=at, **arguments)

    def first_does(self, name: str, **arguments: Any) -> tuple[float, Answer]:
        """Rank 0 alone."""
        at = self._soon()
        self._connections[0].send((name, {**arguments, "at": at}))
        return at, self._answer(0, ANSWER_S)

    def wait(self) -> None:
        """Until all have started."""
        for rank in range(len(self)):
            self._answer(rank, START_S)

    def _soon(self) -> float:
        return time.monotonic() + LEAD_S + LEAD_PER_RANK_S * len(self)

    def _answer(self, rank: int, timeout_s: float) -> Answer:
        if not self._connections[rank].poll(timeout_s):
            raise RuntimeError(f"rank {rank} said nothing within {timeout_s:g} s")
        answer: Answer = self._connections[rank].recv()
        if "error" in answer:
            raise RuntimeError(f"rank {rank}:\n{answer['error']}")
        return answer


@contextmanager
def control_ranks(num_ranks: int, folder: Path) -> Iterator[ControlRanks]:
    """Ranks of one gloo group, ended with the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.control.rank"])
    ends = [context.Pipe() for _ in range(num_ranks)]
    store = str(folder / f"gloo-{os.getpid()}-{num_ranks}")
    processes = [
        context.Process(target=serve, args=(theirs, Settings(rank=rank, num_ranks=num_ranks, store=store)))
        for rank, (_, theirs) in enumerate(ends)
    ]
    try:
        for process, (_, theirs) in zip(processes, ends, strict=True):
            process.start()
            theirs.close()
        ranks = ControlRanks([ours for ours, _ in ends])
        ranks.wait()
        yield ranks
    finally:
        for ours, _ in ends:
            ours.close()
        for process in processes:
            _end(process)


def _end(process: "multiprocessing.process.BaseProcess") -> None:
    if process.pid is None:
        return
    process.join(10)
    process.kill()
    process.join()
