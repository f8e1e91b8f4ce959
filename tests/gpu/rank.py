"""One trainer rank on one GPU, in a process of its own: reads commands as JSON lines, answers with JSON lines.

    python -m tests.gpu.rank TARGET RANK TP_SIZE SHAPE BUCKET_BYTES

{"do": "update", "version": "3"}   sends the weights; they are negated before every update, so that each differs
{"do": "update", "version": "3", "in_place": true}  the same, from one buffer that they stay in
{"do": "let_go"}                   has the engine close what it keeps mapped; seconds that this took
{"do": "stall", "version": "3", "bucket": 2}  sends the buckets before that one, and the rest after one more line
{"do": "measured", "way": "staged", "version": "3"}  sends them, staged, "in_place" or as "dtensors", and says what
                                   that took
{"do": "save", "folder": "/tmp/x"} writes the weights as they are now
{"do": "memory"}                   what this process's allocator holds, after torch's own clean-up
{"do": "copy"}                     seconds for a bare copy of all weights on this GPU: the floor of a sync
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from adapter import TensorSpec, WeightSyncClient, WeightSyncError, allocate_flat
from adapter.planner import plan
from adapter.staging import view_of
from tests.gpu.qwen3 import SHAPES, NamedTensors, Qwen3Shape, random_weights, save_checkpoint


class Rank:
    """The trainer: its weights and its client."""

    def __init__(self, target: str, rank: int, tp_size: int, shape: Qwen3Shape, bucket_bytes: int) -> None:
        torch.cuda.set_device(rank)
        self.shape = shape
        self.weights: NamedTensors = random_weights(shape, 1, torch.device("cuda", rank))
        self._resident = False
        """Whether the weights lie in one exportable buffer."""
        self.client = WeightSyncClient(target, rank=rank, tp_size=tp_size, bucket_bytes=bucket_bytes)

    def update(self, version: str, *, in_place: bool = False) -> dict[str, Any]:
        """Send the negated weights; what came of it, an error too."""
        if in_place and not self._resident:
            self._in_one_buffer()
        torch._foreach_neg_([tensor for _, tensor in self.weights])
        torch.cuda.synchronize()
        started = time.monotonic()
        try:
            result = asdict(self.client.update_weights(self.weights, version=version, in_place=in_place, timeout=120))
        except WeightSyncError as error:
            result = {"error": type(error).__name__, "reason": error.reason, "message": str(error)}
        return {"seconds": time.monotonic() - started, **result}

    def stall(self, version: str, bucket: int) -> dict[str, Any]:
        """Stop in the middle of a bucket, having sent those before it, until another line comes."""
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights]
        before = sum(len(part.placements) for part in plan(specs, self.client.bucket_bytes).buckets[:bucket])

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from self.weights[: before + 1]
            sys.stdin.readline()
            yield from self.weights[before + 1 :]

        return asdict(self.client.update_weights(tensors(), specs=specs, version=version, timeout=120))

    def measured(self, way: str, version: str) -> dict[str, Any]:
        """What one update takes of the GPU, at its peak, against what was stated before it."""
        tensors = {"staged": self._plain, "in_place": self._in_one_buffer, "dtensors": self._as_dtensors}[way]()
        self.client.release_staging()
        stated = self.client.memory_needed(tensors).total
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        result = self.client.update_weights(tensors, version=version, in_place=way == "in_place", timeout=120)
        grown = torch.cuda.max_memory_allocated() - allocated
        reserved_grown = torch.cuda.max_memory_reserved() - reserved
        self.client.release_staging()
        left = torch.cuda.memory_allocated() - allocated
        return {
            "stated": stated,
            "grown": grown,
            "reserved_grown": reserved_grown,
            "left": left,
            "posts": result.num_posts,
        }

    def _plain(self) -> NamedTensors:
        return self.weights

    def _in_one_buffer(self) -> NamedTensors:
        """The same weights in one piece of exportable memory; they stay there."""
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights]
        (bucket,) = plan(specs, 1 << 40).buckets
        flat = allocate_flat(bucket.num_bytes, self.weights[0][1].device)
        views = [(place.spec.name, view_of(flat, place)) for place in bucket.placements]
        for (_, view), (_, tensor) in zip(views, self.weights, strict=True):
            view.copy_(tensor)
        self.weights = views
        self._resident = True
        return views

    def let_go(self) -> dict[str, Any]:
        """Nothing of this process stays mapped in the engine."""
        started = time.monotonic()
        self.client.release_staging()
        return {"seconds": time.monotonic() - started}

    def _as_dtensors(self) -> NamedTensors:
        """As FSDP2 holds them, over NCCL, on this one GPU."""
        dist.init_process_group("nccl", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        mesh = init_device_mesh("cuda", (1,))
        return [(name, DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)) for name, tensor in self.weights]

    def memory(self) -> dict[str, Any]:
        """Bytes that the allocator has given out, without staging buffers, and what an engine may still hold."""
        self.client.release_staging()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        return {"allocated": torch.cuda.memory_allocated(), "unreleased": self.client.unreleased_bytes}

    def copy(self) -> dict[str, Any]:
        """The floor: as many bytes, copied within this process."""
        source = [tensor for _, tensor in self.weights]
        target = [torch.empty_like(tensor) for tensor in source]
        torch._foreach_copy_(target, source)
        torch.cuda.synchronize()
        started = time.monotonic()
        torch._foreach_copy_(target, source)
        torch.cuda.synchronize()
        seconds = time.monotonic() - started
        del target
        torch.cuda.empty_cache()
        return {"seconds": seconds, "bytes": sum(tensor.nbytes for tensor in source)}

    def save(self, folder: str) -> dict[str, Any]:
        """For a load from disk to compare with."""
        save_checkpoint(self.shape, [(name, tensor.cpu()) for name, tensor in self.weights], Path(folder))
        return {}


def main() -> None:
    """Answer commands until standard input ends."""
    target, rank, tp_size, shape, bucket_bytes = sys.argv[1:]
    trainer = Rank(target, int(rank), int(tp_size), SHAPES[shape], int(bucket_bytes))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        print(json.dumps(getattr(trainer, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
