"""Shards of a process group -> one whole tensor, straight into its place.

Invariant: bytes are moved, not numbers, so that every dtype travels over every backend; and all ranks of the group
call with the same row counts, which are known without asking.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

_ALL_GATHER: Callable[..., object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Its name from torch 2.14 on, where the old one warns, or its old name."""


def chunk_rows(num_rows: int, num_ranks: int) -> list[int]:
    """How many rows each rank holds of a tensor cut as torch.chunk and DTensor's Shard do: the last ones fewer."""
    full = -(-num_rows // num_ranks)
    return [min(max(num_rows - rank * full, 0), full) for rank in range(num_ranks)]


def gather_rows(local: torch.Tensor, destination: torch.Tensor, rows: Sequence[int], group: dist.ProcessGroup) -> None:
    """Fill ``destination``, contiguous, with every rank's rows; ``rows[r]`` of them lie in ``local`` of rank r.

    With equal counts on GPUs it is one all-gather into the destination; otherwise one broadcast per rank: gloo's
    all-gather would make a whole copy of its own.
    """
    assert destination.is_contiguous()
    target = _reachable(destination, group)
    mine = as_bytes(local.to(device=target.device, dtype=target.dtype))
    if target.is_cuda and len(set(rows)) == 1:
        _ALL_GATHER(as_bytes(target), mine, group=group)
    else:
        _broadcast_in_turn(mine, as_bytes(target), rows, group)
    if target is not destination:
        destination.copy_(target)


def broadcast_from(local: torch.Tensor | None, destination: torch.Tensor, owner: int, group: dist.ProcessGroup) -> None:
    """Fill ``destination`` with what rank ``owner`` of the group holds as ``local``; the others give None."""
    assert destination.is_contiguous()
    target = _reachable(destination, group)
    if local is not None:
        target.copy_(local)
    if target.numel():
        dist.broadcast(as_bytes(target), src=dist.get_global_rank(group, owner), group=group)
    if target is not destination:
        destination.copy_(target)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8, one-dimensional, of the same memory where the tensor is contiguous."""
    if not tensor.numel():  # of any strides, which torch does not reinterpret
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def reaches(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether the group's backend moves memory of this kind of device."""
    return device.type in _devices(group)


def out_of_reach_bytes(local: torch.Tensor, num_bytes: int, group: dist.ProcessGroup) -> int:
    """What a gather takes where the group's backend does not move memory of the shards' device."""
    return 0 if reaches(local.device, group) else num_bytes + local.numel() * local.element_size()


def _reachable(destination: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The destination, or memory like it that the group's backend can write."""
    if reaches(destination.device, group):
        return destination
    return torch.empty_like(destination, device=_devices(group)[0])


def _devices(group: dist.ProcessGroup) -> list[str]:
    """From "cpu:gloo,cuda:nccl": what the group's collectives take."""
    return [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _broadcast_in_turn(mine: torch.Tensor, target: torch.Tensor, rows: Sequence[int], group: dist.ProcessGroup) -> None:
    row_bytes = target.numel() // max(sum(rows), 1)
    me, offset = dist.get_rank(group), 0
    for rank, count in enumerate(rows):
        piece = target[offset : offset + count * row_bytes]
        broadcast_from(mine if rank == me else None, piece, rank, group)
        offset += count * row_bytes
