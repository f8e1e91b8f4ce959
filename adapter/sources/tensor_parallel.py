"""A tensor-parallel trainer's shards -> whole tensors, from a description of how each parameter is cut.

    def layout(name: str) -> Layout:
        if name.endswith("linear_qkv.weight"):
            return GroupedQkv(hf(name, "q_proj"), hf(name, "k_proj"), hf(name, "v_proj"), num_heads=32, ...)
        if name.endswith("linear_fc1.weight"):
            return GatedColumn(hf(name, "gate_proj"), hf(name, "up_proj"))
        ...
        return Replicated(hf(name))

    client.update_weights(join_shards(model.named_parameters(), layout, tp_group), version=...)

The terms are Megatron's: a column-parallel weight is cut by its rows (output features), a row-parallel one by its
columns. The layouts also name the tensors for the engine, so this is the name map of such a trainer. Invariant: every
rank of ``group`` holds an equal share, in the order of its rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from adapter.sources.gather import gather_rows, out_of_reach_bytes
from adapter.sources.lazy import GatheredTensor, PlainTensor, Sendable


class Layout(ABC):
    """How one parameter of the trainer is cut over its ranks, and what the engine calls what is in it."""

    @abstractmethod
    def join(
        self, local: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Sendable]]:
        """The (Hugging Face name, tensor) pairs in ``local``, this rank's shard."""


@dataclass(frozen=True, slots=True)
class Replicated(Layout):
    """The same whole tensor on every rank."""

    name: str

    def join(
        self, local: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Sendable]]:
        """As it is."""
        yield self.name, PlainTensor(local, dtype)


@dataclass(frozen=True, slots=True)
class Column(Layout):
    """Cut by rows: q, k, v, gate, up, embeddings and the head; biases of these too."""

    name: str
    num_rows: int | None = None
    """Of the whole tensor, where the trainer has padded it (a vocabulary, for instance); the rest is left out."""

    def join(
        self, local: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Sendable]]:
        """Rank after rank."""
        yield self.name, JoinedRows(local, group, dtype, self.num_rows)


@dataclass(frozen=True, slots=True)
class Row(Layout):
    """Cut by columns: the attention's output and the MLP's down projection."""

    name: str

    def join(
        self, local: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Sendable]]:
        """Side by side."""
        yield self.name, JoinedColumns(local, group, dtype)


@dataclass(frozen=True, slots=True)
class GatedColumn(Layout):
    """Gate over up in one parameter (Megatron's linear_fc1), each cut by rows: every rank holds [gate_r; up_r]."""

    gate: str
    up: str

    def join(
        self, local: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Sendable]]:
        """The halves, each rank after rank."""
        halves = local.chunk(2)
        yield self.gate, JoinedRows(halves[0], group, dtype)
        yield self.up, JoinedRows(halves[1], group, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQkv(Layout):
    """Megatron's linear_qkv, weight or bias: for each group of query heads, its queries, then its key, its value."""

    q: str
    k: str
    v: str
    num_heads: int
    """Query heads of the whole model."""
    num_kv_heads: int
    """Groups of the whole model; a multiple of the number of ranks."""
    head_dim: int

    def join(
        self, local: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Sendable]]:
        """Queries, keys and values apart, each rank after rank."""
        per_group = self.num_heads // self.num_kv_heads
        heads = local.reshape(-1, per_group + 2, self.head_dim, *local.shape[1:])
        for name, part in ((self.q, heads[:, :per_group]), (self.k, heads[:, -2:-1]), (self.v, heads[:, -1:])):
            yield name, JoinedRows(part, group, dtype, tail=local.shape[1:])


def join_shards(
    shards: Iterable[tuple[str, torch.Tensor]],
    layout: Callable[[str], Layout | None],
    group: dist.ProcessGroup,
    *,
    dtype: torch.dtype | None = None,
) -> list[tuple[str, Sendable]]:
    """What to send for a tensor-parallel trainer's (own name, shard) pairs; cheap, nothing is gathered yet.

    ``layout`` says of each of the trainer's names how it is cut and what the engine calls it; None leaves it out.
    ``dtype`` casts on the way, before the gather. Called on every rank of ``group``.
    """
    layouts = ((layout(name), tensor.detach()) for name, tensor in shards)
    return [pair for how, local in layouts if how is not None for pair in how.join(local, group, dtype)]


class JoinedRows(GatheredTensor):
    """Equal shards, one below the other."""

    def __init__(
        self,
        local: torch.Tensor,
        group: dist.ProcessGroup,
        dtype: torch.dtype | None = None,
        num_rows: int | None = None,
        *,
        tail: Sequence[int] | None = None,
    ) -> None:
        """``tail``: the shape of one row, where ``local``, a view, is not cut into rows by its first dimension."""
        self._local = local
        self._group = group
        self._tail = tuple(local.shape[1:] if tail is None else tail)
        self._share, ranks = local.numel() // prod(self._tail), dist.get_world_size(group)
        total = self._share * ranks if num_rows is None else num_rows
        self._rows = [min(max(total - rank * self._share, 0), self._share) for rank in range(ranks)]
        self.dtype = dtype or local.dtype
        self.shape = (total, *self._tail)
        copied = self.dtype != local.dtype or not local.is_contiguous()
        shard = 2 * local.numel() * self.dtype.itemsize if copied else 0
        self.extra_bytes = shard + out_of_reach_bytes(local, self.num_bytes, group)

    def write(self, destination: torch.Tensor) -> None:
        """Gather into the rows of the destination."""
        mine = self._local.reshape(self._share, *self._tail)[: self._rows[dist.get_rank(self._group)]]
        gather_rows(mine.to(self.dtype), destination, self._rows, self._group)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """This rank's shard."""
        return (self._local,)


class JoinedColumns(GatheredTensor):
    """Equal shards, side by side: gathered in a whole copy, since a rank's columns do not lie together."""

    def __init__(self, local: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype | None = None) -> None:
        self._local = local
        self._group = group
        self._ranks = dist.get_world_size(group)
        self.dtype = dtype or local.dtype
        self.shape = (local.shape[0], local.shape[1] * self._ranks)
        self.extra_bytes = self.num_bytes + local.numel() * self.dtype.itemsize

    def write(self, destination: torch.Tensor) -> None:
        """Gather rank by rank, then put the columns in their place."""
        rows, columns = self._local.shape
        gathered = torch.empty(self._ranks * rows, columns, dtype=self.dtype, device=self._local.device)
        gather_rows(self._local.to(self.dtype), gathered, [rows] * self._ranks, self._group)
        for rank, part in enumerate(torch.split(gathered, rows)):
            destination[:, rank * columns : (rank + 1) * columns].copy_(part)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """This rank's shard."""
        return (self._local,)
