"""One trainer rank, in a process of its own: reads commands as JSON lines, answers with JSON lines.

    python -m benchmarks.sync.rank '{"rank": 0, "tp_size": 1, "model": "dense-8b", "device": "cuda", "store": "/tmp/x"}'

A command names a method of ``Trainer``; "at" is the moment (time.monotonic, one clock for all processes of a host) at
which all ranks start. Standard output belongs to the answers; what libraries print goes to standard error. Invariant:
the weights are other ones before every update, and are in memory, synchronised, before the clock starts.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from adapter import TensorSpec, WeightSyncClient, allocate_flat
from adapter.exports import Export, export_of
from adapter.planner import Plan, plan
from adapter.staging import view_of
from benchmarks.peers import PEERS, sglang_classes
from benchmarks.peers.surroundings import Engine, Measured, Place
from benchmarks.shapes import MODELS, NamedTensors, random_weights
from benchmarks.sync import direct
from benchmarks.sync.ways import WHOLE

UPDATE_S = 100.0
GROUP_S = 60.0
RELEASE_S = 5.0
READY_S = 30.0

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the process is started with."""

    rank: int
    tp_size: int
    model: str
    device: str
    store: str
    """A file that does not exist yet, by which the ranks' gloo group finds itself."""
    peers: bool
    """Whether to import what the peers need of SGLang."""


class Trainer:
    """The weights, and every way of sending them."""

    def __init__(self, settings: Settings) -> None:
        self._shape = MODELS[settings.model]
        self._device = torch.device("cuda", settings.rank) if settings.device == "cuda" else torch.device("cpu")
        self._place = Place(settings.rank, settings.tp_size, settings.device, self._shape.peer_bucket_bytes)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{settings.store}",
            rank=settings.rank,
            world_size=settings.tp_size,
            timeout=timedelta(seconds=GROUP_S),
        )
        self._weights: NamedTensors = []
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._export: Export | None = None
        self._clients: dict[tuple[str, int], WeightSyncClient] = {}
        if settings.peers:
            sglang_classes.prepare(settings.device)

    def make(self) -> Answer:
        """Make the weights: once the server has taken its share of the GPU, which it measures while it starts."""
        if self._place.device == "cuda":
            torch.cuda.set_device(self._device)
        self._weights = random_weights(self._shape, 1, self._device)
        self._synchronize()
        return {}

    # Between the ways.

    def flip(self) -> Answer:
        """Other weights: the same ones, negated."""
        torch._foreach_neg_([tensor for _, tensor in self._weights])
        self._synchronize()
        return {}

    def flatten(self) -> Answer:
        """Move the weights into one exportable buffer."""
        if not self._flat.numel():
            (bucket,) = self._whole().buckets
            self._flat = allocate_flat(bucket.num_bytes, self._device)
            weights = dict(self._weights)
            self._weights = []
            views = [(place.spec.name, view_of(self._flat, place)) for place in bucket.placements]
            for name, view in views:
                view.copy_(weights.pop(name))
            self._weights = views
        return self.tidy()

    def tidy(self) -> Answer:
        """Give back what the last way has left: clients, staging buffers, cached memory."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._export = None
        if self._place.device == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        return {}

    # The ways.

    def floor(self, flat: bool, repeats: int) -> Answer:
        """Seconds for a bare copy of all weights within this process, the target allocated and touched before."""
        source = [self._flat] if flat else [tensor for _, tensor in self._weights]
        target = [torch.empty_like(tensor) for tensor in source]
        copy = (lambda: target[0].copy_(source[0])) if flat else (lambda: torch._foreach_copy_(target, source))
        return {"seconds": [self._timed(copy) for _ in range(repeats)]}

    def peer(self, name: str, url: str, uses_sessions: bool, at: float) -> Answer:
        """One update in another system's way."""
        measured = Measured()
        engine = Engine(url, uses_sessions=uses_sessions, measured=measured) if self._place.rank == 0 else None
        wait_until(at)
        PEERS[name](self._weights, self._place, engine, measured)
        return {"seconds": time.monotonic() - at, "phases": measured.phases, "counts": measured.counts}

    def ours(self, target: str, bucket_bytes: int, in_place: bool, version: str, at: float) -> Answer:
        """One update through the sidecar at ``target``."""
        client = self._client(target, bucket_bytes)
        wait_until(at)
        result = client.update_weights(self._weights, version=version, in_place=in_place, timeout=UPDATE_S)
        return {"seconds": time.monotonic() - at, "result": asdict(result)}

    def lend(self) -> Answer:
        """A handle of the flat buffer, for one importer."""
        self._export = export = self._export or export_of(self._flat)
        give_up = time.monotonic() + RELEASE_S
        while not export.released() and time.monotonic() < give_up:  # a TP rank may let go after rank 0 has answered
            time.sleep(0.001)
        return {"handle": export.handle().SerializeToString().hex()}

    def direct(self, url: str, uses_sessions: bool, handles: list[str], version: str, at: float) -> Answer:
        """On rank 0: the POSTs that the sidecar would make, with every rank's handle."""
        return self.repost(url, uses_sessions, direct.body(self._whole(), handles).decode(), version, at)

    def repost(self, url: str, uses_sessions: bool, body: str, version: str, at: float) -> Answer:
        """On rank 0: the same with a payload that is there already."""
        poster, load = direct.Poster(url, uses_sessions=uses_sessions), body.encode()
        wait_until(at)
        phases = poster.update(load, version)
        return {"seconds": time.monotonic() - at, "phases": phases, "counts": {"http_body": len(load), "posts": 1}}

    # Inside.

    def _whole(self) -> Plan:
        """All weights in one bucket."""
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._weights]
        return plan(specs, WHOLE)

    def _client(self, target: str, bucket_bytes: int) -> WeightSyncClient:
        """Kept from update to update, as a trainer keeps it."""
        if (target, bucket_bytes) not in self._clients:
            self._clients[target, bucket_bytes] = client = WeightSyncClient(
                target, rank=self._place.rank, tp_size=self._place.tp_size, bucket_bytes=bucket_bytes
            )
            client.wait_ready(READY_S)  # a sidecar that has just started looks for its engine
        return self._clients[target, bucket_bytes]

    def _timed(self, act: Callable[[], object]) -> float:
        self._synchronize()
        started = time.monotonic()
        act()
        self._synchronize()
        return time.monotonic() - started

    def _synchronize(self) -> None:
        if self._place.device == "cuda":
            torch.cuda.synchronize()


def wait_until(moment: float) -> None:
    """Sleep, and spin the last fifth of a millisecond: several ranks start together without keeping cores busy."""
    time.sleep(max(0.0, moment - time.monotonic() - 0.0002))
    while time.monotonic() < moment:
        pass


def _answer(trainer: Trainer, command: dict[str, Any]) -> Answer:
    try:
        answer: Answer = getattr(trainer, command.pop("do"))(**command)
    except Exception as error:  # noqa: BLE001 - the process's edge: the benchmark says what went wrong and goes on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    return answer


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trainer = Trainer(Settings(**json.loads(sys.argv[1])))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(trainer, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
