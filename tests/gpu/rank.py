"""One trainer rank on one GPU, in a process of its own: reads commands as JSON lines, answers with JSON lines.

    python -m tests.gpu.rank TARGET RANK TP_SIZE SHAPE BUCKET_BYTES

{"do": "update", "version": "3"}   sends the weights; they are negated before every update, so that each differs
{"do": "stall", "version": "3", "bucket": 2}  sends the buckets before that one, and the rest after one more line
{"do": "save", "folder": "/tmp/x"} writes the weights as they are now
{"do": "memory"}                   what this process's allocator holds, after torch's own clean-up
{"do": "copy"}                     seconds for a bare copy of all weights on this GPU: the floor of a sync
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapter import TensorSpec, WeightSyncClient, WeightSyncError
from adapter.planner import plan
from tests.gpu.qwen3 import SHAPES, NamedTensors, Qwen3Shape, random_weights, save_checkpoint


class Rank:
    """The trainer: its weights and its client."""

    def __init__(self, target: str, rank: int, tp_size: int, shape: Qwen3Shape, bucket_bytes: int) -> None:
        torch.cuda.set_device(rank)
        self.shape = shape
        self.weights: NamedTensors = random_weights(shape, 1, torch.device("cuda", rank))
        self.client = WeightSyncClient(target, rank=rank, tp_size=tp_size, bucket_bytes=bucket_bytes)

    def update(self, version: str) -> dict[str, Any]:
        """Send the negated weights; what came of it, an error too."""
        torch._foreach_neg_([tensor for _, tensor in self.weights])
        torch.cuda.synchronize()
        started = time.monotonic()
        try:
            result = asdict(self.client.update_weights(self.weights, version=version, timeout=120))
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

    def memory(self) -> dict[str, Any]:
        """Bytes that the allocator has given out, and what an engine may still hold."""
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
