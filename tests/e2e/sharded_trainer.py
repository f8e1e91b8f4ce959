"""What each rank of a trainer does whose weights are cut over its ranks, and whose engine is reached by broadcast."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adapter import WeightSyncClient, WeightSyncError
from adapter.demo import tiny_model
from tests.e2e.engines import SMALL_BUCKET_BYTES

TIMEOUT_S = 60.0


def send(target: str, versions: list[tuple[int, str]]) -> list[str]:
    """One update after the other by ``(seed, version)``: what this rank is told of each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with WeightSyncClient(
        target,
        rank=dist.get_rank(),
        tp_size=dist.get_world_size(),
        bucket_bytes=SMALL_BUCKET_BYTES,
        device="cpu",
        transport="distributed",
    ) as client:
        told = []
        for number, (seed, version) in enumerate(versions):
            whole = tiny_model.random_weights(seed)
            cut = ((name, distribute_tensor(tensor, mesh, [Shard(0)])) for name, tensor in whole)
            told.append(_outcome(client, cut, version, f"sharded {version}, {number}"))
    return told


def _outcome(client: WeightSyncClient, cut: Iterator[tuple[str, Tensor]], version: str, update_id: str) -> str:
    try:
        return client.update_weights(cut, version=version, update_id=update_id, timeout=TIMEOUT_S).weight_version
    except WeightSyncError as error:
        return f"{type(error).__name__}: {error}"
