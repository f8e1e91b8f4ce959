"""Small JSON values between the ranks of one process group: at an engine's start and for generation.

An update never comes here. Invariant: nothing is pickled; every rank takes part in every call, in the same order, and
what went wrong on one rank is raised on all of them. A rank that waits for a long answer of rank 0 hears of it every
few seconds, so that the process group's own time-out does not pass.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adapter import errors
from adapter.errors import WeightSyncError

Result = TypeVar("Result")

_BUSY, _ANSWER, _FAILURE = range(3)


class Exchange:
    """The ranks of one group; ``rank`` and ``size`` are this process's in it.

    Args:
        group: torch's process group.
        round_s: how often ranks that wait for rank 0 hear that there is no answer yet.
    """

    def __init__(self, group: dist.ProcessGroup, *, round_s: float = 5.0) -> None:
        self._group = group
        self._round_s = round_s
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._source = dist.get_global_rank(group, 0)
        self._device = _device_of(group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        with _speaking():
            mine = self._bytes(value)
            lengths = [int(length) for length in self._all(torch.tensor([len(mine)], device=self._device))]
            padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
            padded[: len(mine)] = mine
            return [_value(data[:length]) for data, length in zip(self._all(padded), lengths, strict=True)]

    def agree(self, step: Callable[[], Any]) -> list[Any]:
        """Every rank takes the step; all results, or the first failure on every rank."""
        failure: Exception | None = None
        said: dict[str, Any] = {}
        try:
            said["value"] = step()
        except Exception as error:  # noqa: BLE001 - an edge between processes: CUDA's RuntimeError is the others' too
            failure, said["error"] = error, _told(error)
        answers = self.gather(said)
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise _revived(answer["error"], f"rank {rank}: ")
        return [answer["value"] for answer in answers]

    def together(self, step: Callable[[], Result]) -> Result:
        """As ``agree``, for a result that each rank keeps for itself and that need not be JSON."""
        kept: list[Result] = []
        self.agree(lambda: kept.append(step()))
        return kept[0]

    def ask(self, question: Callable[[], Any]) -> Any:
        """Rank 0 asks; the same answer, or the same error, on every rank."""
        if self.rank == 0:
            return self._ask_and_tell(question)
        while True:
            kind, content = self._hear()
            if kind == _ANSWER:
                return content
            if kind == _FAILURE:
                raise _revived(content)

    def stream(self, start: Callable[[], Generator[Any, None, None]]) -> Iterator[Any]:
        """What rank 0's generator yields, on every rank; all of them must take every item, or none any more."""
        items = start() if self.rank == 0 else _nothing()
        with contextlib.closing(items):
            while (item := self.ask(lambda: _next(items))) is not None:
                yield item[0]

    def _ask_and_tell(self, question: Callable[[], Any]) -> Any:
        asked = _Asked(question)
        while not self._has_answer(asked):
            self._tell(_BUSY, None)
        if asked.error is None:
            self._tell(_ANSWER, asked.answer)
            return asked.answer
        self._tell(_FAILURE, _told(asked.error))
        raise asked.error

    def _has_answer(self, asked: "_Asked") -> bool:
        try:
            return asked.wait(self._round_s)
        except BaseException as error:  # Ctrl-C: the others would wait for as long as this process goes on
            with contextlib.suppress(WeightSyncError):
                self._tell(_FAILURE, _told(error))
            raise

    def _tell(self, kind: int, content: Any) -> None:
        with _speaking():
            data = self._bytes(content)
            self._from_rank_0(torch.tensor([kind, len(data)], device=self._device))
            self._from_rank_0(data)

    def _hear(self) -> tuple[int, Any]:
        with _speaking():
            kind, length = (int(number) for number in self._from_rank_0(torch.zeros(2, dtype=torch.int64)))
            return kind, _value(self._from_rank_0(torch.zeros(length, dtype=torch.uint8)))

    def _from_rank_0(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self._device)
        dist.broadcast(tensor, src=self._source, group=self._group)
        return tensor

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self._group)
        return gathered

    def _bytes(self, value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)


class _Asked:
    """A question on a thread of its own, so that the others can be told to wait on."""

    def __init__(self, question: Callable[[], Any]) -> None:
        self.answer: Any = None
        self.error: BaseException | None = None
        self._question = question
        # A daemon: Ctrl-C must not wait for an answer that nobody wants any more.
        self._thread = threading.Thread(target=self._run, name="weight-sync-ask", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._question()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            self.error = error

    def wait(self, timeout_s: float) -> bool:
        """Whether it has been answered."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


@contextlib.contextmanager
def _speaking() -> Iterator[None]:
    """What torch raises for a broken group comes out as our own error."""
    try:
        yield
    except RuntimeError as error:
        raise WeightSyncError(f"another rank of the mesh is gone, or its process group is broken: {error}") from error


def _nothing() -> Generator[Any, None, None]:
    yield from ()


def _next(items: Iterator[Any]) -> list[Any] | None:
    """The next item in a list, so that None means the end and nothing else."""
    for item in items:
        return [item]
    return None


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group takes its tensors from: the host, unless it has NCCL alone."""
    backend = str(dist.get_backend(group))
    if "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _value(data: torch.Tensor) -> Any:
    text = bytearray(len(data))
    torch.frombuffer(text, dtype=torch.uint8).copy_(data)
    return json.loads(text)


def _told(error: BaseException) -> dict[str, Any]:
    """An error as the other ranks get it."""
    if isinstance(error, WeightSyncError):
        kind, details = type(error).__name__, {"reason": error.reason, "details": error.details}
        return {"kind": kind, "message": str(error), **details}
    if isinstance(error, ValueError):
        return {"kind": "ValueError", "message": str(error)}
    return {"kind": "WeightSyncError", "message": f"{type(error).__name__}: {error}".rstrip(": ")}


def _revived(told: dict[str, Any], prefix: str = "") -> Exception:
    message = prefix + told["message"]
    if told["kind"] == "ValueError":
        return ValueError(message)
    kind: type[WeightSyncError] = getattr(errors, told["kind"])
    return kind(message, reason=told.get("reason", ""), details=told.get("details"))
