"""One trainer rank of the control benchmark: a process with a gloo group, a client of the sidecar, and little memory.

Answers what comes through its pipe: the name of a method of ``ControlRank`` and its keywords. Both ways run in the same
processes, from one moment on (time.monotonic, one clock for the host).
"""

import io
import time
import traceback
from base64 import b64encode
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from adapter import TensorSpec, WeightSyncClient, allocate_flat
from adapter.exports import export_of
from adapter.planner import Plan, plan
from adapter.staging import view_of
from benchmarks.sync import direct
from benchmarks.sync.ways import WHOLE

CALL_S = 60.0
GROUP_S = 120.0
SHAPE = (2, 8)

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the process is started with."""

    rank: int
    num_ranks: int
    store: str


class ControlRank:
    """A client, a group, and a model of any number of tiny tensors."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
        self._settings = settings
        dist.init_process_group(
            "gloo",
            init_method=f"file://{settings.store}",
            rank=settings.rank,
            world_size=settings.num_ranks,
            timeout=timedelta(seconds=GROUP_S),
        )
        self._client: WeightSyncClient | None = None

    def open(self, target: str, num_tensors: int, prefix: str) -> Answer:
        """A model, and a client of the sidecar at ``target``."""
        self.close()
        self._plan = plan(specs(num_tensors, prefix), WHOLE)
        flat = allocate_flat(self._plan.buckets[0].num_bytes, torch.device("cpu"))
        self._weights = [(place.spec.name, view_of(flat, place)) for place in self._plan.buckets[0].placements]
        self._export = export_of(allocate_flat(flat.numel(), torch.device("cpu")))
        self._gathered = _payload(self._plan)
        settings = self._settings
        self._client = WeightSyncClient(target, rank=settings.rank, tp_size=settings.num_ranks, bucket_bytes=WHOLE)
        self._client.wait_ready(CALL_S)
        return {}

    def close(self) -> Answer:
        """Let the client go."""
        if self._client is not None:
            self._client.close()
        return {}

    def ours(self, version: str, at: float) -> Answer:
        """One update through the sidecar, the weights in place; when it was answered."""
        assert self._client is not None
        _sleep_until(at)
        result = self._client.update_weights(self._weights, version=version, in_place=True, timeout=CALL_S)
        return {"end": time.monotonic(), "phases": asdict(result)["phases"]}

    def gather(self, at: float) -> Answer:
        """``gather_object`` of a payload that is there already; on rank 0, when a POST could be made."""
        gathered = [""] * self._settings.num_ranks
        _sleep_until(at)
        dist.gather_object(self._gathered, gathered if self._settings.rank == 0 else None, dst=0)
        return {"end": time.monotonic(), "bytes": len(self._gathered)}

    def lend(self) -> Answer:
        """A handle for one importer."""
        return {"handle": self._export.handle().SerializeToString().hex()}

    def direct(self, url: str, handles: list[str], version: str, at: float) -> Answer:
        """On rank 0: the POSTs that the sidecar makes, without it."""
        poster, body = direct.Poster(url, uses_sessions=True), direct.body(self._plan, handles)
        _sleep_until(at)
        phases = poster.update(body, version)
        return {"end": time.monotonic(), "phases": phases}


def specs(num_tensors: int, prefix: str) -> list[TensorSpec]:
    """Tiny tensors under names as long as a checkpoint's; the prefix makes another manifest."""
    names = (f"{prefix}.layers.{number // 100}.mlp.experts.{number % 100}.w.weight" for number in range(num_tensors))
    return [TensorSpec(name, torch.bfloat16, SHAPE) for name in names]


def _payload(planned: Plan) -> str:
    """What slime's ranks gather: a flattened bucket's handle and metadata, pickled, in base64."""
    (bucket,) = planned.buckets
    flat = torch.empty(bucket.num_bytes, dtype=torch.uint8)
    metadata = [
        SimpleNamespace(
            name=place.spec.name,
            shape=torch.Size(place.spec.shape),
            dtype=place.spec.dtype,
            start_idx=place.byte_offset,
            end_idx=place.byte_offset + place.spec.num_bytes,
            numel=place.spec.num_bytes,
        )
        for place in bucket.placements
    ]
    pickled = io.BytesIO()
    ForkingPickler(pickled).dump({"flattened_tensor": flat, "metadata": metadata})
    flat.untyped_storage()._shared_decref()  # nobody will open it
    return b64encode(pickled.getvalue()).decode()


def _sleep_until(moment: float) -> None:
    """Without spinning: there may be more ranks than cores."""
    time.sleep(max(0.0, moment - time.monotonic()))


def serve(commands: "Connection[Any, Any]", settings: Settings) -> None:
    """The process, until the pipe's other end is closed."""
    rank = ControlRank(settings)
    commands.send({})
    while True:
        try:
            name, arguments = commands.recv()
        except EOFError:
            rank.close()
            return
        commands.send(_answer(rank, name, arguments))


def _answer(rank: ControlRank, name: str, arguments: dict[str, Any]) -> Answer:
    try:
        answer: Answer = getattr(rank, name)(**arguments)
    except Exception:  # noqa: BLE001 - the process's edge: the benchmark's process raises it again
        return {"error": traceback.format_exc()}
    return answer
