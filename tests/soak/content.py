"""What the engine should hold: every tensor made from a seed of its own, so that an update can carry a part of them.

Owns how a content becomes weights, and what `/weights_checker` must answer for it. Invariant: a content gives the same
bytes in every process, and `rank_checksums` is computed from them alone: nothing is learned from the engine.

Facts borrowed (SGLang 0.5.23, Qwen3): q, k and v of a rank are one parameter, and so are gate and up; a checksum is the
first 8 bytes of a parameter's SHA-256.
"""

import functools
import hashlib
import zlib
from collections.abc import Iterator, Mapping

import torch

from adapter.demo.tiny_model import NamedTensors, tensor_shapes

Content = Mapping[str, int]
"""A seed for every tensor, by its Hugging Face name."""

SHAPES = dict(tensor_shapes())
NAMES = tuple(SHAPES)
_FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_INSIDE_A_FUSED_ONE = ("k_proj", "v_proj", "up_proj")
_CUT_BY_COLUMNS = ("o_proj", "down_proj")
# Large enough that greedy tokens depend on the weights instead of on rounding.
_STD = 0.2


def whole(seed: int) -> dict[str, int]:
    """Every tensor from the same seed."""
    return dict.fromkeys(NAMES, seed)


def tensor(name: str, seed: int) -> torch.Tensor:
    """One tensor's bytes."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (seed << 32))
    around = 1.0 if len(shape) == 1 else 0.0  # the one-dimensional tensors are all norms
    return (torch.randn(shape, generator=generator) * _STD + around).to(torch.bfloat16)


def named_tensors(content: Content) -> NamedTensors:
    """The content as a checkpoint has it."""
    return [(name, tensor(name, seed)) for name, seed in content.items()]


def rank_checksums(content: Content, tp_size: int) -> list[dict[str, str]]:
    """What the engine must say of a complete content, by rank."""
    groups = [(parameter, tuple((name, content[name]) for name in names)) for parameter, names in _parameters()]
    return [{name: _checksum(parts, rank, tp_size) for name, parts in groups} for rank in range(tp_size)]


def _parameters() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The engine's parameters, each with the tensors that it is made of."""
    for name in NAMES:
        *path, kind, weight = name.split(".")
        if kind in _FUSED:
            fused, parts = _FUSED[kind]
            yield ".".join((*path, fused, weight)), tuple(".".join((*path, part, weight)) for part in parts)
        elif kind not in _INSIDE_A_FUSED_ONE:
            yield name, (name,)


@functools.lru_cache(maxsize=4096)
def _checksum(parts: tuple[tuple[str, int], ...], rank: int, tp_size: int) -> str:
    shard = torch.cat([_shard(name, seed, rank, tp_size) for name, seed in parts])
    return hashlib.sha256(shard.view(torch.uint8).numpy().tobytes()).digest()[:8].hex()


def _shard(name: str, seed: int, rank: int, tp_size: int) -> torch.Tensor:
    full = tensor(name, seed)
    if full.dim() == 1:
        return full
    return full.chunk(tp_size, dim=1 if name.split(".")[-2] in _CUT_BY_COLUMNS else 0)[rank].contiguous()
