"""Experts that a trainer keeps in one stacked tensor -> one tensor per expert, as checkpoints and SGLang name them.

Transformers 5 holds a layer's experts as ``experts.gate_up_proj`` [E, 2 * I, H] and ``experts.down_proj`` [E, H, I]
(models/qwen3_moe, models/deepseek_v2), though its checkpoints, and SGLang's loaders, have
``experts.3.gate_proj.weight`` and so on; under the stacked names SGLang would skip them without a word. Invariant:
nothing is copied here.
"""

import re
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor, Replicate

from adapter.sources.lazy import LazyTensor, NamedTensors, PlainTensor, Sendable
from adapter.sources.sharded import RowOfDTensor, row_sharded_dim

_STACKED = re.compile(r"^(?P<experts>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)$")


def unstack_experts(named_tensors: NamedTensors, *, dtype: torch.dtype | None = None) -> list[tuple[str, Sendable]]:
    """The pairs, with every stacked tensor of experts replaced by one pair per expert and projection.

    ``named_weights`` does it with ``split_experts``. A stack that is a DTensor must be cut by
    experts, or not at all. ``dtype`` casts the experts on the way.
    """
    unstacked: list[tuple[str, Sendable]] = []
    for name, value in named_tensors:
        stacked = _STACKED.match(name)
        unstacked += [(name, value)] if stacked is None else _experts(stacked, value, dtype)
    return unstacked


def _experts(stacked: re.Match[str], value: Sendable, dtype: torch.dtype | None) -> Iterator[tuple[str, LazyTensor]]:
    name = stacked.group()
    if not isinstance(value, torch.Tensor) or value.dim() != 3:
        raise ValueError(f"{name} must be a tensor [experts, rows, columns] to be unstacked")
    half = value.shape[1] // 2
    parts = {"gate_proj": slice(0, half), "up_proj": slice(half, 2 * half)}
    if stacked["kind"] == "down_proj":
        parts = {"down_proj": slice(0, value.shape[1])}
    for expert in range(value.shape[0]):
        for part, rows in parts.items():
            yield f"{stacked['experts']}.{expert}.{part}.weight", _row(name, value, expert, rows, dtype)


def _row(name: str, value: torch.Tensor, expert: int, rows: slice, dtype: torch.dtype | None) -> LazyTensor:
    if not isinstance(value, DTensor):
        return PlainTensor(value[expert][rows], dtype)
    if all(isinstance(placement, Replicate) for placement in value.placements):
        return PlainTensor(value.to_local().detach()[expert][rows], dtype)
    if row_sharded_dim(value) is None:
        raise ValueError(f"{name} is cut as {value.placements}; stacked experts are unstacked where they are cut by 0")
    return RowOfDTensor(value, expert, rows, dtype)
