"""One gloo rank that exchanges values and says on its standard output, as JSON lines, what it got.

python -m tests.integration.verl_exchange_rank RANK SIZE STORE SCENE
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch.distributed as dist

from adapter.errors import LaunchError, WeightSyncError
from adapter.exchange import Exchange
from adapter.verl_engine.control import EngineControl
from adapter.verl_engine.deaths import Deaths
from adapter.verl_engine.facts import EngineFacts


def tell(value: Any) -> None:
    print(json.dumps(value), flush=True)


def attempt(call: Callable[[], Any]) -> Any:
    """What it gives, or what it raises."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test sees it
        return [type(error).__name__, str(error), getattr(error, "details", None)]


def gather(exchange: Exchange) -> None:
    """Values of very different lengths, several times."""
    for round_ in range(3):
        tell(exchange.gather({"rank": exchange.rank, "text": "ü" * exchange.rank * 1000, "round": round_}))


def agree(exchange: Exchange) -> None:
    """All well; then rank 1 fails as a peer does, as a caller does, and with a defect's error of the system."""
    tell(exchange.agree(lambda: exchange.rank * 10))
    for error in (
        LaunchError("no GPU", details={"a": "b"}),
        ValueError("bad"),
        FileNotFoundError("gone"),
        RuntimeError("CUDA error"),
    ):
        tell(attempt(lambda error=error: exchange.agree(lambda: _raise_on_1(exchange, error))))  # type: ignore[misc]
    tell(exchange.gather("still in step"))


def together(exchange: Exchange) -> None:
    """Each rank's own result, or the failure of rank 1."""
    tell([*exchange.together(lambda: {exchange.rank})])
    tell(attempt(lambda: exchange.together(lambda: _raise_on_1(exchange, ValueError("bad")))))
    tell(exchange.gather("in step"))


def _raise_on_1(exchange: Exchange, error: Exception) -> None:
    if exchange.rank == 1:
        raise error


def ask(exchange: Exchange) -> None:
    """Rank 0's answer, its errors, and an answer that takes several rounds."""
    tell(exchange.ask(lambda: {"asked by": exchange.rank}))
    for error in (WeightSyncError("SGLang said no", reason="R"), ValueError("bad"), KeyError("a defect")):
        tell(attempt(lambda error=error: exchange.ask(lambda: _raise(error))))  # type: ignore[misc]
    tell(exchange.ask(_late))
    tell(len(exchange.ask(lambda: "x" * 3_000_000)))


def _raise(error: Exception) -> None:
    raise error


def _late() -> str:
    time.sleep(1.0)
    return "late"


def interrupt(exchange: Exchange) -> None:
    """Ctrl-C while rank 0 waits for an answer; it goes on, as a notebook does."""

    def question() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    try:
        tell(attempt(lambda: exchange.ask(question)))
    except KeyboardInterrupt:
        tell("interrupted")
    tell(exchange.gather("in step"))


class Server(BaseHTTPRequestHandler):
    """Frees the KV cache; refuses all else."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        frees = self.path.startswith("/release") and b"weights" not in body
        self.send_response(200 if frees or self.path.startswith("/flush") else 400)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


def memory(exchange: Exchange) -> None:
    """Releases that rank 0 alone sees fail and succeed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}" if exchange.rank == 0 else "http://127.0.0.1:9"
    facts = EngineFacts(sidecar="unix:/nowhere", server_url=url)
    control = EngineControl(facts, Deaths(facts, "here"), exchange, acts=exchange.rank == 0)
    for call in (
        lambda: control.release("weights", 1.0),
        lambda: control.release("weight", 1.0),
        lambda: control.release("kv_cache", 1.0),
        lambda: control.resume(None),
    ):
        tell([attempt(call), control.memory.released])


def stream(exchange: Exchange) -> None:
    """Items in step, one that breaks off, and one that nobody wants to the end."""
    closed = []

    def numbers(last: int) -> Generator[Any, None, None]:
        try:
            for number in range(5):
                if number == last:
                    raise WeightSyncError("broke off")
                yield number or None
        finally:
            closed.append(exchange.rank)

    tell(list(exchange.stream(lambda: numbers(9))))
    tell(attempt(lambda: list(exchange.stream(lambda: numbers(2)))))
    items = exchange.stream(lambda: numbers(9))
    tell([next(items), next(items)])
    items.close()  # type: ignore[attr-defined]
    tell(exchange.gather(closed))


def death(exchange: Exchange) -> None:
    """The last rank dies while the others wait for it."""
    if exchange.rank == exchange.size - 1:
        os._exit(7)
    tell(attempt(lambda: exchange.gather(1)))


def subgroup(exchange: Exchange) -> None:
    """Ranks 1 and 2 of the world are ranks 0 and 1 of a group of their own."""
    group = dist.new_group([1, 2])
    if dist.get_rank() > 0:
        inner = Exchange(group)  # type: ignore[arg-type]
        tell([inner.gather(inner.rank), inner.ask(dist.get_rank)])
    exchange.gather(None)


SCENES = {scene.__name__: scene for scene in (gather, agree, together, ask, interrupt, memory, stream, death, subgroup)}


def main(rank: int, size: int, store: str, scene: str) -> None:
    """The whole process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    SCENES[scene](Exchange(dist.group.WORLD, round_s=0.2))
    if scene != "death":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
