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


def send(target: str, versions: list[tuple[int, str]], wrong_at: int | None = None) -> list[str]:
    """One update after the other by ``(seed, version)``: what this rank is told of each.

    ``wrong_at``: at that one the trainer brings what the engine cannot load.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    told = []
    with WeightSyncClient(
        target,
        rank=dist.get_rank(),
        tp_size=dist.get_world_size(),
        bucket_bytes=SMALL_BUCKET_BYTES,
        device="cpu",
        transport="distributed",
    ) as client:
        for number, (seed, version) in enumerate(versions):
            whole = tiny_model.random_weights(seed)
            if number == wrong_at:
                whole = [(f"unknown.{name}", tensor) for name, tensor in whole]
            cut = ((name, distribute_tensor(tensor, mesh, [Shard(0)])) for name, tensor in whole)
            told.append(_outcome(client, cut, version))
    return told


def _outcome(client: WeightSyncClient, cut: Iterator[tuple[str, Tensor]], version: str) -> str:
    try:
        return client.update_weights(
            cut, version=version, update_id=f"sharded {version}", timeout=TIMEOUT_S
        ).weight_version
    except WeightSyncError as error:
        return type(error).__name__
