"""The trainer's processes, from the benchmark's side: started together, told together, every answer waited for.

Invariant: no wait is longer than it was told to be, and ``close`` leaves no process behind.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.sync.rank import Answer, Settings

ANSWER_S = 120.0
LEAD_S = 0.02
"""From the order to the moment at which all ranks start."""


class RankFailed(RuntimeError):
    """A rank's process died, was silent for too long, or says that a command failed."""


class RankProcess:
    """One of the trainer's processes; see ``benchmarks.sync.rank``."""

    def __init__(self, settings: Settings, log_path: Path, env: Mapping[str, str]) -> None:
        self.name = f"trainer rank {settings.rank}"
        self._log_path = log_path
        command = [sys.executable, "-m", "benchmarks.sync.rank", json.dumps(asdict(settings))]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env={**os.environ, **env}, bufsize=0
            )
        self._unread = b""

    def tell(self, command: Mapping[str, Any]) -> None:
        """Give it a command, without waiting."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
        except BrokenPipeError as error:
            raise RankFailed(f"{self.name} has died; see {self._log_path}") from error

    def answer(self, timeout_s: float = ANSWER_S) -> Answer:
        """Wait for its answer."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            self._unread += self._more(deadline)
        line, _, self._unread = self._unread.partition(b"\n")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise RankFailed(f"{self.name}: {answer['error']}")
        return answer

    def _more(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise RankFailed(f"{self.name} was silent for too long; see {self._log_path}")
        more = os.read(self._process.stdout.fileno(), 1 << 20)
        if not more:
            raise RankFailed(f"{self.name} has died; see {self._log_path}")
        return more

    def close(self) -> None:
        """End it, in order if it lets us."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Ranks:
    """The whole trainer; starting up until ``wait``."""

    def __init__(
        self, folder: Path, *, model: str, tp_size: int, device: str, peers: bool, env: Mapping[str, str]
    ) -> None:
        self._store = folder / f"gloo-{os.getpid()}-{time.monotonic_ns()}"
        settings = [
            Settings(rank=rank, tp_size=tp_size, model=model, device=device, store=str(self._store), peers=peers)
            for rank in range(tp_size)
        ]
        self._ranks = [RankProcess(one, folder / f"rank{one.rank}.log", env) for one in settings]

    def wait(self, timeout_s: float) -> None:
        """Until every rank has imported what it needs."""
        for rank in self._ranks:
            rank.answer(timeout_s)

    def all_do(self, do: str, **arguments: Any) -> list[Answer]:
        """One command for all; their answers, by rank. Raises ``RankFailed`` once every rank has answered."""
        return self._each(lambda _: {"do": do, **arguments})

    def all_at_once(self, do: str, **arguments: Any) -> list[Answer]:
        """The same, begun at one moment."""
        return self.all_do(do, at=time.monotonic() + LEAD_S, **arguments)

    def each_at_once(self, do: str, by_rank: list[dict[str, Any]]) -> list[Answer]:
        """The same, with arguments of each rank's own."""
        at = time.monotonic() + LEAD_S
        return self._each(lambda rank: {"do": do, "at": at, **by_rank[rank]})

    def first_does(self, do: str, **arguments: Any) -> Answer:
        """Rank 0 alone, at once."""
        self._ranks[0].tell({"do": do, "at": time.monotonic() + LEAD_S, **arguments})
        return self._ranks[0].answer()

    def _each(self, command: Callable[[int], dict[str, Any]]) -> list[Answer]:
        for number, rank in enumerate(self._ranks):
            rank.tell(command(number))
        answers: list[Answer] = []
        failures: list[RankFailed] = []
        for rank in self._ranks:
            try:
                answers.append(rank.answer())
            except RankFailed as failure:
                failures.append(failure)
        if failures:
            raise RankFailed("; ".join(map(str, failures)))
        return answers

    def close(self) -> None:
        """End all of them."""
        for rank in self._ranks:
            rank.close()
        self._store.unlink(missing_ok=True)
