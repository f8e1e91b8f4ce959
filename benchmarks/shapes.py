"""Models by their shape: the names and sizes that SGLang asks for, with random weights instead of a download.

Invariant: a shape's tensors are those of its config's checkpoint, all of them, in the checkpoint's order.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

NamedTensors = list[tuple[str, torch.Tensor]]

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Qwen3, dense or with experts, by the config's names where it has them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    mlp: int
    """Of a dense model."""
    head_dim: int = 128
    experts: int = 0
    """0: dense."""
    experts_per_token: int = 8
    expert_mlp: int = 0
    bucket_bytes: int = 2 * GIB
    """For the ways that send it in several buckets."""
    peer_bucket_bytes: int = GIB // 2
    """slime's: 512 MiB, unless the model is smaller than that."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's Hugging Face name and shape."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for name, shape in self._layer():
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "input_layernorm", (self.hidden,)
        yield "self_attn.q_proj", (heads, self.hidden)
        yield "self_attn.k_proj", (kv_heads, self.hidden)
        yield "self_attn.v_proj", (kv_heads, self.hidden)
        yield "self_attn.o_proj", (self.hidden, heads)
        yield "self_attn.q_norm", (self.head_dim,)
        yield "self_attn.k_norm", (self.head_dim,)
        yield "post_attention_layernorm", (self.hidden,)
        if not self.experts:
            yield from self._mlp("mlp", self.mlp)
            return
        yield "mlp.gate", (self.experts, self.hidden)
        for expert in range(self.experts):
            yield from self._mlp(f"mlp.experts.{expert}", self.expert_mlp)

    def _mlp(self, name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.gate_proj", (width, self.hidden)
        yield f"{name}.up_proj", (width, self.hidden)
        yield f"{name}.down_proj", (self.hidden, width)

    def config(self) -> dict[str, object]:
        """What config.json says."""
        kind = "qwen3_moe" if self.experts else "qwen3"
        common: dict[str, object] = {
            "architectures": ["Qwen3MoeForCausalLM" if self.experts else "Qwen3ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }
        return {**common, **(self._expert_config() if self.experts else {})}

    def _expert_config(self) -> dict[str, object]:
        return {
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.expert_mlp,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def write_config(self, folder: Path) -> Path:
        """A model folder without weights, for ``--load-format dummy``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1))
        return folder


_TINY_BUCKETS = {"bucket_bytes": 1 << 20, "peer_bucket_bytes": 1 << 19}

DENSE_TINY = ModelShape(hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=256, vocab=512, **_TINY_BUCKETS)
"""1.4 MB, 47 tensors."""
MOE_TINY = ModelShape(
    hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=256, vocab=512,
    experts=32, experts_per_token=2, expert_mlp=64, **_TINY_BUCKETS,
)  # fmt: skip
"""7 MB, 423 tensors."""
DENSE_8B = ModelShape(hidden=4096, layers=36, heads=32, kv_heads=8, mlp=12288, vocab=151936)
"""Qwen3-8B: 15.26 GiB, 399 tensors."""
MOE_12_LAYERS = ModelShape(
    hidden=2048, layers=12, heads=32, kv_heads=4, mlp=6144, vocab=151936, experts=128, expert_mlp=768
)
"""Qwen3-30B-A3B with 12 of its 48 layers: 15.09 GiB, 4,719 tensors."""
MOE_48_LAYERS = ModelShape(
    hidden=1024, layers=48, heads=16, kv_heads=4, mlp=3072, vocab=151936, experts=128, expert_mlp=256
)
"""As many tensors as Qwen3-30B-A3B has, 18,867, each small enough that all of them fit."""

MODELS = {
    "dense-tiny": DENSE_TINY,
    "moe-tiny": MOE_TINY,
    "dense-8b": DENSE_8B,
    "moe-12l": MOE_12_LAYERS,
    "moe-48l": MOE_48_LAYERS,
}


def random_weights(shape: ModelShape, seed: int, device: torch.device) -> NamedTensors:
    """All tensors in bfloat16, made on ``device``, each in memory of its own; the same on GPUs of one kind."""
    generator = torch.Generator(device).manual_seed(seed)
    return [(name, _random(size, generator, device)) for name, size in shape.tensors()]


def _random(size: tuple[int, ...], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    noise = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
    return noise + 1 if len(size) == 1 else noise  # the one-dimensional tensors are all norms
