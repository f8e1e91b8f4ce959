"""What the ranks of these tests do: each function runs on every rank, and returns what the test looks at."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from adapter.sources import LazyTensor, Sendable, as_lazy, join_shards, named_weights, unstack_experts
from adapter.sources.gather import chunk_rows
from adapter.sources.tensor_parallel import Layout


def numbers(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """The same on every rank; small integers, so that every dtype holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, tuple(shape), generator=generator).to(dtype)


def mesh() -> DeviceMesh:
    """All ranks, in one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def group() -> dist.ProcessGroup:
    """All ranks."""
    world = dist.group.WORLD
    assert world is not None
    return world


def written(tensor: LazyTensor) -> torch.Tensor:
    """As staging does it: into the middle of a region that holds other bytes."""
    region = torch.full((tensor.num_bytes + 128,), 7, dtype=torch.uint8)
    place = region[64 : 64 + tensor.num_bytes].view(tensor.dtype).view(tensor.shape)
    tensor.write(place)
    assert bool((region[:64] == 7).all())
    assert bool((region[64 + tensor.num_bytes :] == 7).all())
    return place


def equal(tensor: LazyTensor, expected: torch.Tensor) -> bool:
    """Whether what arrives is, in dtype, shape and values, what was expected."""
    arrived = written(tensor)
    assert (tensor.dtype, tensor.shape) == (expected.dtype, tuple(expected.shape))
    return torch.equal(arrived.to(torch.float64), expected.to(torch.float64))


def dtensor(shape: Sequence[int], placements: Sequence[Placement], dtype: torch.dtype) -> tuple[torch.Tensor, DTensor]:
    """A whole tensor, and the same as a DTensor over all ranks."""
    whole = numbers(shape, dtype)
    return whole, distribute_tensor(whole, mesh(), list(placements))


def gather_dtensor(
    shape: Sequence[int], placements: Sequence[Placement], dtype: torch.dtype, sent: torch.dtype
) -> bool:
    whole, value = dtensor(shape, placements, dtype)
    return equal(as_lazy(value, sent), whole.to(sent))


def gather_over_two_dimensions(shape: Sequence[int], placements: Sequence[Placement]) -> bool:
    """On a mesh of 1 x 3, as HSDP has it."""
    whole = numbers(shape)
    value = distribute_tensor(whole, init_device_mesh("cpu", (1, 3)), list(placements))
    return equal(as_lazy(value), whole)


def one_gives_up_in_the_middle(shape: Sequence[int], placements: Sequence[Placement]) -> bool:
    """Rank 1 forgoes the first of two tensors; the others write both."""
    whole, value = dtensor(shape, placements, torch.float32)
    first, second = as_lazy(value), as_lazy(value)
    if dist.get_rank() == 1:
        first.forgo(torch.device("cpu"))
    else:
        assert equal(first, whole)
    return equal(second, whole)


def extra_bytes(shape: Sequence[int], placements: Sequence[Placement], sent: torch.dtype) -> int:
    _, value = dtensor(shape, placements, torch.float32)
    return as_lazy(value, sent).extra_bytes


def gather_sharded_tensor(num_rows: int, num_columns: int, sent: torch.dtype) -> bool:
    """As FSDP1's sharded state dict has it: rows in chunks, the last ranks maybe without any."""
    whole = numbers((num_rows, num_columns))
    rank, counts = dist.get_rank(), chunk_rows(num_rows, dist.get_world_size())
    start = sum(counts[:rank])
    mine = whole[start : start + counts[rank]].clone()
    shards = [LocalShard.from_tensor_and_offsets(mine, [start, 0], rank)] if counts[rank] else []
    return equal(as_lazy(init_from_local_shards(shards, num_rows, num_columns), sent), whole.to(sent))


def gather_sharded_tensor_of_a_part(num_rows: int) -> bool:
    """Over ranks 1 and 2 only, as on the second node of FSDP1's hybrid sharding."""
    part = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return True
    whole = numbers((num_rows, 2))
    counts, place = chunk_rows(num_rows, 2), dist.get_rank() - 1
    start = sum(counts[:place])
    shard = LocalShard.from_tensor_and_offsets(
        whole[start : start + counts[place]].clone(), [start, 0], dist.get_rank()
    )
    value = init_from_local_shards([shard], num_rows, 2, process_group=part)
    return equal(as_lazy(value), whole)


def unstacked(num_experts: int, placements: Sequence[Placement], sent: torch.dtype) -> dict[str, torch.Tensor]:
    """Every expert's tensors, as this rank would send them."""
    _, gate_up = dtensor((num_experts, 4, 3), placements, torch.float32)
    _, down = dtensor((num_experts, 3, 2), placements, torch.float32)
    stacks: list[tuple[str, Sendable]] = [("mlp.experts.gate_up_proj", gate_up), ("mlp.experts.down_proj", down)]
    pairs = unstack_experts(stacks, dtype=sent)
    return {name: written(as_lazy(value)).clone() for name, value in pairs}


def joined(
    local_of: Sequence[torch.Tensor], layout: Layout, sent: torch.dtype | None, forgoer: int = -1
) -> dict[str, torch.Tensor]:
    """This rank's shard of ``local_of``, joined with the others'; ``forgoer`` only takes part."""
    pairs = join_shards([("weight", local_of[dist.get_rank()])], lambda _: layout, group(), dtype=sent)
    if dist.get_rank() == forgoer:
        for _, value in pairs:
            as_lazy(value).forgo(torch.device("cpu"))
        return {}
    return {name: written(as_lazy(value)).clone() for name, value in pairs}


def fsdp1_arrives_whole(sent: torch.dtype) -> bool:
    """A real FSDP1 module's sharded state dict, against the module before it was wrapped."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2))
    whole = {name: tensor.clone().to(sent) for name, tensor in module.state_dict().items()}
    wrapped = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
        sharded = wrapped.state_dict()
    pairs = dict(named_weights(sharded, dtype=sent))
    assert pairs.keys() == whole.keys()
    return all(equal(as_lazy(value), whole[name]) for name, value in pairs.items())
