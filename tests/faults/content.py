"""What the matrix's updates contain, and what an engine that holds exactly one version answers.

Content follows from the version, so that every process knows it. Invariant: an update covers the whole model, and two
versions share no tensor's bytes, so an answer that rests on tensors of two versions equals that of neither.
"""

import hashlib
from collections.abc import Sequence

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes.scripted_engine import CHECKPOINT
from tests.fakes.weights import Weights

NUM_BUCKETS = 2
TP_SIZE = 2
CHECKPOINT_VERSION = "default"
PROMPT = (11, 42, 7)
NUM_TOKENS = 8
NAMES = (
    (*CHECKPOINT, "model.layers.0.mlp.up_proj.weight"),
    ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"),
)
"""Of the tensors, by bucket."""
_ROWS, _COLUMNS = 4, 8
TENSOR_BYTES = _ROWS * _COLUMNS * 4

Loaded = list[dict[str, str]]
"""Per TP rank: tensor name -> digest, as ``ScriptedEngine.loaded``."""


def manifest() -> pb.Manifest:
    """Two buckets of two tensors."""
    return pb.Manifest(buckets=[_bucket(names) for names in NAMES])


def _bucket(names: Sequence[str]) -> pb.BucketSpec:
    tensors = [
        pb.TensorSpec(
            name=name,
            dtype=pb.DATA_TYPE_FLOAT32,
            shape=[_ROWS, _COLUMNS],
            byte_offset=number * TENSOR_BYTES,
            size_bytes=TENSOR_BYTES,
        )
        for number, name in enumerate(names)
    ]
    return pb.BucketSpec(size_bytes=len(names) * TENSOR_BYTES, tensors=tensors)


def bucket_content(version: str, bucket: int) -> bytes:
    """One bucket's bytes, the same on every rank."""
    return b"".join(_tensor(version, name) for name in NAMES[bucket])


def loaded_by(version: str) -> Loaded:
    """What a scripted engine holds after a complete update to ``version``, or after its start."""
    if version == CHECKPOINT_VERSION:
        return [dict(CHECKPOINT) for _ in range(TP_SIZE)]
    digests = {name: hashlib.sha256(_tensor(version, name)).hexdigest()[:16] for names in NAMES for name in names}
    return [dict(digests) for _ in range(TP_SIZE)]


def holds(loaded: Loaded, version: str, bucket: int) -> bool:
    """Whether every rank has this bucket of ``version``."""
    whole = loaded_by(version)
    return all(mine.get(name) == rank[name] for mine, rank in zip(loaded, whole, strict=True) for name in NAMES[bucket])


def loaded_from_disk(folder: str) -> Loaded:
    """What it holds after it loaded this checkpoint over an earlier update."""
    weights = _weights(loaded_by("any"))
    weights.load_from_disk(folder)
    return weights.ranks


def tokens_of(loaded: Loaded) -> list[int]:
    """What it then answers greedily."""
    return _weights(loaded).tokens(PROMPT, NUM_TOKENS)


def _weights(loaded: Loaded) -> Weights:
    weights = Weights(len(loaded), CHECKPOINT, None)
    weights.ranks = loaded
    return weights


def _tensor(version: str, name: str) -> bytes:
    return hashlib.shake_256(f"{version} {name}".encode()).digest(TENSOR_BYTES)
