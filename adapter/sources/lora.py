"""LoRA adapters: merged into the base weights on the way, or picked out to be sent alone.

Knows peft's layout by its attributes and names and does not import it (peft 0.21, tuners/lora/layer.py): a wrapped
module has ``base_layer``, ``lora_A``, ``lora_B`` and ``scaling``. Invariant: the trainer's own weights are never
changed, and a merge equals peft's own up to rounding: base + scaling * B @ A, the product in the adapter's dtype.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adapter.sources.lazy import LazyTensor, Sendable
from adapter.sources.module import as_lazy

PEFT_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.|_orig_mod\.")
"""Of activation checkpointing, FSDP1 and torch.compile: in modules' paths, but not in the state dict."""


class MergedLora(LazyTensor):
    """One base weight [out, in] with scaling * B @ A added; A is [r, in], B is [out, r]."""

    def __init__(
        self,
        base: Sendable,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        *,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._base = as_lazy(base)
        self._a, self._b = a.detach(), b.detach()
        self._scaling = scaling
        self._transposed = transposed
        self.dtype, self.shape = dtype or self._base.dtype, self._base.shape
        factors = self._a.numel() + self._b.numel()
        numbers = self._base.num_bytes // self._base.dtype.itemsize
        self.extra_bytes = self._base.extra_bytes + 8 * (2 * numbers + factors)

    def write(self, destination: torch.Tensor) -> None:
        """The base, and then what the adapter adds to it, in the base's own dtype; a cast comes last."""
        same = self._base.dtype == self.dtype
        whole = destination if same else torch.empty_like(destination, dtype=self._base.dtype)
        self._base.write(whole)
        whole.add_(self._delta(whole.device))
        if not same:
            destination.copy_(whole)

    def forgo(self, device: torch.device) -> None:
        """Take part in the gathers of the base and of both factors."""
        self._base.forgo(device)
        for factor in (self._a, self._b):
            _whole(factor)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """What this rank holds of the base and of the factors."""
        factors = (factor.to_local() if isinstance(factor, DTensor) else factor for factor in (self._a, self._b))
        return (*self._base.local_tensors(), *factors)

    def _delta(self, device: torch.device) -> torch.Tensor:
        a, b = _whole(self._a), _whole(self._b)
        delta = (b.to(device) @ a.to(device)).mul_(self._scaling)
        return delta.T if self._transposed else delta


def _whole(factor: torch.Tensor) -> torch.Tensor:
    return factor.full_tensor() if isinstance(factor, DTensor) else factor


def merged_lora(
    model: nn.Module, *, adapter: str = "default", dtype: torch.dtype | None = None
) -> list[tuple[str, Sendable]]:
    """The weights of a peft model with one adapter merged, under the base model's names; nothing is computed yet.

    Raises ``ValueError`` for adapters that are more than B @ A (DoRA, embeddings, convolutions) and for unknown names.
    """
    merged = dict(_merged_modules(model, adapter, dtype))
    if not merged:
        raise ValueError(f"the model has no LoRA adapter called {adapter!r}")
    own = {name: value for name, value in model.state_dict().items() if not _is_of_adapter(name, adapter)}
    if lost := merged.keys() - own.keys():
        raise ValueError(f"{min(lost)} is not in the model's state dict: its adapter would not be merged")
    return [(_base_name(name, adapter), merged.get(name, as_lazy(value, dtype))) for name, value in own.items()]


def lora_adapter(model: nn.Module, *, adapter: str = "default") -> list[tuple[str, Sendable]]:
    """The adapter's own tensors, named as in peft's adapter_model.safetensors."""
    marks = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
    found = [(name, value) for name, value in model.state_dict().items() if any(mark in name for mark in marks)]
    if not found:
        raise ValueError(f"the model has no LoRA adapter called {adapter!r}")
    return [(name.replace(f".{adapter}.", "."), value) for name, value in found]


def _merged_modules(model: nn.Module, adapter: str, dtype: torch.dtype | None) -> Iterator[tuple[str, MergedLora]]:
    for path, module in model.named_modules():
        factors: Any = getattr(module, "lora_A", None)
        if factors is not None and hasattr(module, "base_layer") and adapter in _adapters(module):
            yield f"{_WRAPPERS.sub('', path)}.base_layer.weight", _merge(path, module, adapter, dtype)


def _adapters(module: Any) -> list[str]:
    return [*module.lora_A, *getattr(module, "lora_embedding_A", ())]


def _merge(path: str, module: Any, adapter: str, dtype: torch.dtype | None) -> MergedLora:
    if getattr(module, "merged", False):
        raise ValueError(f"{path}: an adapter is merged into its weights already; call unmerge_adapter() first")
    if getattr(module, "use_dora", {}).get(adapter) or adapter not in module.lora_A:
        raise ValueError(f"{path}: only plain LoRA of linear layers is merged on the way; merge it in the trainer")
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    if a.dim() != 2 or getattr(module.lora_B[adapter], "bias", None) is not None:
        raise ValueError(f"{path}: only LoRA of linear layers without lora_bias is merged on the way")
    transposed = bool(getattr(module, "fan_in_fan_out", False))
    return MergedLora(module.base_layer.weight, a, b, module.scaling[adapter], transposed=transposed, dtype=dtype)


def _is_of_adapter(name: str, adapter: str) -> bool:
    """What is no weight of the merged model: factors, what was trained anew, and other adapters' copies of it."""
    others = ".modules_to_save." in name and f".modules_to_save.{adapter}." not in name
    return ".lora_" in name or ".original_module." in name or others


def _base_name(name: str, adapter: str) -> str:
    plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    return plain.replace(f".modules_to_save.{adapter}.", ".")
