"""slime: flattened buckets of 512 MiB, gathered on rank 0, one POST each, one after the other.

Described by slime's backends/megatron_utils/update_weight/update_weight_from_tensor.py: tensors are collected until
a bucket is full, concatenated into one, serialised, gathered by ``gather_object`` over gloo and POSTed with
load_format "flattened_bucket"; the next bucket begins when the answer is there. After each, CUDA memory whose importer
has let go is collected; the cache of torch's allocator is not emptied, which slime has dropped for its cost.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from benchmarks.peers import sglang_classes
from benchmarks.peers.surroundings import Engine, Measured, Place
from benchmarks.shapes import NamedTensors


def update(tensors: NamedTensors, place: Place, engine: Engine | None, measured: Measured) -> None:
    """On every rank."""
    if engine is None:
        for bucket in buckets_of(tensors, place.bucket_bytes):
            _send(bucket, place, None, measured)
        return
    with engine.held():
        for bucket in buckets_of(tensors, place.bucket_bytes):
            _send(bucket, place, engine, measured)


def buckets_of(tensors: NamedTensors, bucket_bytes: int) -> Iterator[NamedTensors]:
    """Tensors in order, as many as fit; one that is larger has a bucket of its own."""
    bucket: NamedTensors = []
    used = 0
    for name, tensor in tensors:
        if bucket and used + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += tensor.nbytes
    yield bucket


def _send(bucket: NamedTensors, place: Place, engine: Engine | None, measured: Measured) -> None:
    with measured.phase("export"):
        flattened = sglang_classes.flattened_bucket(bucket)
        own = sglang_classes.serialize_text(flattened)
    measured.count("gather", len(own))
    with measured.phase("collect"):
        gathered = [""] * place.tp_size
        dist.gather_object(own, gathered if place.rank == 0 else None, dst=0)
    if engine is not None:
        engine.load(gathered, "flattened_bucket")
    if place.device == "cuda":
        with measured.phase("export"):
            del flattened
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
