"""The trainer's side as its starter sees it: one process per rank, told what to send, asked how it went.

Invariant: ranks never talk to each other, only their starter talks to each; every wait has a deadline.
"""

import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adapter.errors import LaunchError
from adapter.launch import ManagedProcess

_START_TIMEOUT_S = 120.0  # importing torch takes long on a busy machine
_ANSWER_MARGIN_S = 30.0  # the rank makes its weights before its own deadline begins


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """How one rank's update went, as the rank told it."""

    seconds: float
    error: str = ""
    kind: str = ""
    num_posts: int = 0
    cache_flushed: bool = False
    load_path: str = ""
    load_reason: str = ""
    weight_version: str = ""
    phases: dict[str, float]


class TrainerRank:
    """One rank in a process of its own, with its output in a log file."""

    def __init__(
        self,
        target: str,
        rank: int,
        tp_size: int,
        log_path: Path,
        *,
        device: str = "cpu",
        bucket_bytes: int = 2 << 30,
    ) -> None:
        self.rank = rank
        self._commands, theirs = multiprocessing.Pipe()
        options = {"fd": theirs.fileno(), "target": target, "rank": rank, "tp-size": tp_size, "device": device}
        argv = [f"--{name}={value}" for name, value in {**options, "bucket-bytes": bucket_bytes}.items()]
        with theirs:
            self.process = ManagedProcess(
                f"trainer rank {rank}",
                [sys.executable, "-m", "adapter.demo.trainer", *argv],
                log_path,
                pass_fds=[theirs.fileno()],
            )

    def start_update(self, seed: int, version: str, timeout_s: float = 60.0) -> None:
        """Lets the rank send that seed's weights; returns at once."""
        command = {"seed": seed, "version": version, "timeout_s": timeout_s}
        self._commands.send_bytes(json.dumps(command).encode())

    def finish_update(self, timeout_s: float = 60.0) -> RankReport:
        """How the update that was started went.

        Raises:
            LaunchError: The rank died or said nothing in time.
        """
        return _report(self._receive(timeout_s + _ANSWER_MARGIN_S))

    def wait_ready(self) -> None:
        """Until the rank has imported what it needs.

        Raises:
            LaunchError: The rank died or said nothing in time.
        """
        self._receive(_START_TIMEOUT_S)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while not self._commands.poll(0.1):
            if time.monotonic() > deadline:
                raise LaunchError(f"{self.process.name} said nothing; its log:\n{self.process.log_text()}")
        try:
            answer: dict[str, Any] = json.loads(self._commands.recv_bytes())
        except EOFError as error:
            raise LaunchError(f"{self.process.name} died; its log:\n{self.process.log_text()}") from error
        return answer

    def stop(self) -> None:
        """Ends the rank; closing the socket tells it to."""
        self._commands.close()
        self.process.wait_exit(10.0)
        self.process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextlib.contextmanager
def trainer_ranks(
    target: str, devices: Sequence[str], workdir: Path, *, bucket_bytes: int = 2 << 30
) -> Iterator[list[TrainerRank]]:
    """One ready rank per device, all of them ended with the block."""
    with contextlib.ExitStack() as stack:
        ranks: list[TrainerRank] = []
        for rank, device in enumerate(devices):
            log_path = workdir / f"trainer-{rank}.log"
            started = TrainerRank(target, rank, len(devices), log_path, device=device, bucket_bytes=bucket_bytes)
            ranks.append(stack.enter_context(started))
        for started in ranks:
            started.wait_ready()
        yield ranks


def update_all(ranks: Sequence[TrainerRank], seed: int, version: str, timeout_s: float = 60.0) -> list[RankReport]:
    """Every rank sends the same update at the same time."""
    for rank in ranks:
        rank.start_update(seed, version, timeout_s)
    return [rank.finish_update(timeout_s) for rank in ranks]


def _report(answer: dict[str, Any]) -> RankReport:
    known = {field.name for field in fields(RankReport)}
    return RankReport(**{"phases": {}, **{name: value for name, value in answer.items() if name in known}})
