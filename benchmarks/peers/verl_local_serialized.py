"""verl and VerlEngine: a pickle per tensor and rank, gathered on rank 0, one LocalSerializedTensor per tensor.

Described by SGLang's srt/weight_sync/utils.py and verl's SGLang rollout: each rank serialises every tensor alone,
``gather_object`` over gloo brings the lists to rank 0, which puts the ranks' pickles of one tensor together and
serialises the whole list once per TP rank. One POST of everything; verl itself sends one per 2 GiB.
"""

import torch.distributed as dist

from benchmarks.peers import sglang_classes
from benchmarks.peers.surroundings import Engine, Measured, Place
from benchmarks.shapes import NamedTensors

Serialized = list[tuple[str, bytes]]


def update(tensors: NamedTensors, place: Place, engine: Engine | None, measured: Measured) -> None:
    """On every rank."""
    if engine is None:
        _gather(tensors, place, measured)
        return
    with engine.held():
        by_rank = _gather(tensors, place, measured)
        with measured.phase("export"):
            entries = _entries(by_rank, place.tp_size)
        engine.load(entries, None)


def _gather(tensors: NamedTensors, place: Place, measured: Measured) -> list[Serialized]:
    """By rank, on rank 0."""
    with measured.phase("export"):
        own = [(name, sglang_classes.serialize(tensor.detach())) for name, tensor in tensors]
    measured.count("gather", sum(len(name) + len(pickled) for name, pickled in own))
    with measured.phase("collect"):
        gathered: list[Serialized] = [[] for _ in range(place.tp_size)]
        dist.gather_object(own, gathered if place.rank == 0 else None, dst=0)
    return gathered


def _entries(by_rank: list[Serialized], tp_size: int) -> list[str]:
    local = sglang_classes.local_serialized_tensor()
    together = [
        (of_one[0][0], local(values=[pickled for _, pickled in of_one])) for of_one in zip(*by_rank, strict=True)
    ]
    return [sglang_classes.serialize_text(together) for _ in range(tp_size)]
