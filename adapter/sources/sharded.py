"""DTensors (FSDP2, tensor parallel) and FSDP1's ShardedTensors, gathered one at a time into their place.

The collectives run over the trainer's own process group, in the order of the tensors: all ranks of that group send
the same update. Invariant: a tensor cut by rows over one mesh dimension, which is all that FSDP makes, is gathered
without a second whole copy; any other cut takes two for a moment, and says so in ``extra_bytes``.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from adapter.sources.gather import broadcast_from, chunk_rows, gather_rows, out_of_reach_bytes
from adapter.sources.lazy import GatheredTensor


class ShardedDTensor(GatheredTensor):
    """A DTensor of any placements."""

    def __init__(self, value: DTensor, dtype: torch.dtype | None = None) -> None:
        self._value = value
        self._local = value.to_local().detach()
        self.dtype = dtype or value.dtype
        self.shape = tuple(value.shape)
        self._row_dim = row_sharded_dim(value)
        self._replicated = all(isinstance(placement, Replicate) for placement in value.placements)
        self.extra_bytes = self._extra_bytes()

    def write(self, destination: torch.Tensor) -> None:
        """Gather, unless every rank has the whole tensor anyway."""
        if self._replicated:
            destination.copy_(self._local)
        elif self._row_dim is None:
            self._write_whole(destination)
        else:
            mesh = self._value.device_mesh
            rows = chunk_rows(self.shape[0], mesh.size(self._row_dim))
            gather_rows(self._local.to(self.dtype), destination, rows, mesh.get_group(self._row_dim))

    def _write_whole(self, destination: torch.Tensor) -> None:
        whole = self._value.to(self.dtype)
        assert isinstance(whole, DTensor)
        with torch.no_grad():
            destination.copy_(whole.full_tensor())

    def forgo(self, device: torch.device) -> None:
        """Gather for the others' sake."""
        if not self._replicated:
            super().forgo(device)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """This rank's shard."""
        return (self._local,)

    def _extra_bytes(self) -> int:
        if self._replicated:
            return 0
        if self._row_dim is None:  # gathered whole, and put in order
            return 2 * self.num_bytes
        group = self._value.device_mesh.get_group(self._row_dim)
        copied = self.dtype != self._local.dtype or not self._local.is_contiguous()
        shard = self._local.numel() * self.dtype.itemsize if copied else 0
        return shard + out_of_reach_bytes(self._local, self.num_bytes, group)


def row_sharded_dim(value: DTensor) -> int | None:
    """The one mesh dimension over which ``value`` is cut, by rows; None if it is cut in another way, or not at all."""
    cut = [dim for dim, placement in enumerate(value.placements) if not isinstance(placement, Replicate)]
    if len(cut) == 1 and type(value.placements[cut[0]]) is Shard and value.placements[cut[0]].is_shard(0):
        return cut[0]
    return None


class RowOfDTensor(GatheredTensor):
    """``value[index][rows]`` of a stacked DTensor that is cut by its first dimension: it lies on one rank."""

    def __init__(self, value: DTensor, index: int, rows: slice, dtype: torch.dtype | None = None) -> None:
        dim = row_sharded_dim(value)
        assert dim is not None, "the caller sees to it"
        mesh = value.device_mesh
        counts = chunk_rows(value.shape[0], mesh.size(dim))
        self._owner, position = divmod(index, counts[0])
        self._group = mesh.get_group(dim)
        local = value.to_local().detach()
        mine = dist.get_rank(self._group) == self._owner
        self._local = local[position][rows] if mine else None
        self.dtype = dtype or value.dtype
        self.shape = (len(range(*rows.indices(value.shape[1]))), *value.shape[2:])
        self.extra_bytes = out_of_reach_bytes(local[:0], self.num_bytes, self._group)

    def write(self, destination: torch.Tensor) -> None:
        """Broadcast from the rank that has it."""
        broadcast_from(self._local, destination, self._owner, self._group)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """The row, on the rank that has it."""
        return () if self._local is None else (self._local,)


class ChunkedShardedTensor(GatheredTensor):
    """A ShardedTensor of FSDP1's sharded state dict: rows, one shard per rank, the last ranks maybe without."""

    def __init__(self, value: ShardedTensor, dtype: torch.dtype | None = None) -> None:
        meta = value.metadata()
        self._shards = sorted(meta.shards_metadata, key=lambda shard: shard.shard_offsets)
        if any(any(shard.shard_offsets[1:]) for shard in self._shards):
            raise ValueError("a ShardedTensor is cut by columns; only cuts by rows, as FSDP makes them, are gathered")
        self._group: dist.ProcessGroup = value._process_group
        self._mine = [shard.tensor.detach() for shard in value.local_shards()]
        self.dtype = dtype or meta.tensor_properties.dtype
        self.shape = tuple(meta.size)
        out_of_reach = [out_of_reach_bytes(tensor, self.num_bytes, self._group) for tensor in self._mine]
        self.extra_bytes = sum(tensor.numel() for tensor in self._mine) * self.dtype.itemsize + sum(out_of_reach)

    def write(self, destination: torch.Tensor) -> None:
        """Broadcast shard after shard, each into its rows."""
        me, mine = dist.get_rank(), iter(self._mine)
        for shard in self._shards:
            rows = destination.narrow(0, shard.shard_offsets[0], shard.shard_sizes[0])
            owner = _owner(shard)
            in_group = dist.get_group_rank(self._group, owner)
            broadcast_from(next(mine) if owner == me else None, rows, in_group, self._group)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """This rank's shards."""
        return tuple(self._mine)


def _owner(shard: ShardMetadata) -> int:
    """Its rank in the whole trainer, not in the group that it is cut over."""
    rank = shard.placement.rank() if shard.placement is not None else None
    assert isinstance(rank, int), "a shard without a place"
    return rank
