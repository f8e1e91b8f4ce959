"""A module, a state dict or any named tensors -> what is sent: each value lazily, under the engine's name.

Called in every trainer rank. Invariant: nothing is gathered, cast or copied here.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from adapter.sources.experts import unstack_experts
from adapter.sources.lazy import LazyTensor, NamedTensors, PlainTensor, Sendable
from adapter.sources.sharded import ChunkedShardedTensor, ShardedDTensor

NameMap = Callable[[str], str | None]
"""The trainer's name -> the engine's (Hugging Face); None leaves the tensor out."""


def as_lazy(value: Sendable, dtype: torch.dtype | None = None) -> LazyTensor:
    """One value of a state dict as something that can be written into a bucket; raises ``ValueError`` for others.

    ``dtype`` casts on the way; a ``LazyTensor`` has its own already.
    """
    if isinstance(value, LazyTensor):
        return value
    if isinstance(value, DTensor):
        return ShardedDTensor(value, dtype)
    if isinstance(value, ShardedTensor):
        return ChunkedShardedTensor(value, dtype)
    if isinstance(value, torch.Tensor):
        return PlainTensor(value, dtype)
    raise ValueError(f"a {type(value).__name__} cannot be sent: give a tensor, a DTensor or a LazyTensor")


def lazy_tensors(pairs: Iterable[tuple[str, Sendable]]) -> dict[str, LazyTensor]:
    """The values by name; raises ``ValueError`` naming one that is no tensor."""
    return {name: _named(name, value) for name, value in pairs}


def _named(name: str, value: Sendable) -> LazyTensor:
    try:
        return as_lazy(value)
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from error


def named_weights(
    source: nn.Module | Mapping[str, Sendable] | NamedTensors,
    *,
    dtype: torch.dtype | None = None,
    name_map: NameMap | None = None,
    split_experts: bool = False,
) -> list[tuple[str, Sendable]]:
    """What to send for a module (plain, FSDP2, any DTensor), a state dict (FSDP1's sharded one too), or pairs.

    ``dtype``: what arrives at the engine; floating-point tensors are cast on the way, before they are gathered.
    ``name_map``: for trainers whose names differ from the checkpoint's.
    ``split_experts``: for models of transformers 5 that stack a layer's experts though their checkpoint does not
    (``unstack_experts``); their names are mapped after that.
    A module whose config says tie_word_embeddings is sent without the names that share another one's memory.
    """
    tied = _tied_names(source) if isinstance(source, nn.Module) else frozenset[str]()
    pairs: NamedTensors = [(name, value) for name, value in _pairs(source) if name not in tied]
    if split_experts:
        pairs = unstack_experts(pairs, dtype=dtype)
    return [(to, _cast(value, dtype)) for to, value in _renamed(pairs, name_map)]


def _pairs(source: nn.Module | Mapping[str, Sendable] | NamedTensors) -> NamedTensors:
    if isinstance(source, nn.Module):
        return list(source.state_dict().items())
    return source.items() if isinstance(source, Mapping) else source


def _renamed(pairs: NamedTensors, name_map: NameMap | None) -> NamedTensors:
    for name, value in pairs:
        if name.endswith("_extra_state"):  # what a module keeps besides tensors
            continue
        to = name if name_map is None else name_map(name)
        if to is not None:
            yield to, value


def _cast(value: Sendable, dtype: torch.dtype | None) -> LazyTensor:
    is_float = getattr(value, "dtype", torch.float32).is_floating_point
    return as_lazy(value, dtype if is_float else None)


def _tied_names(module: nn.Module) -> frozenset[str]:
    """Parameters that are another one under a second name, where the model's own config says that it is so."""
    if not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
        return frozenset()
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    everyone: Iterable[tuple[str, nn.Parameter]] = module.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in everyone if first[id(parameter)] != name)
