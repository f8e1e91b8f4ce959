"""A Qwen3 of any size with random weights made on the GPU, for tests that move gigabytes.

Invariant: one seed gives the same bytes on every GPU of one kind, so that ranks agree without talking to each other.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

NamedTensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Shape:
    """Sizes of a dense Qwen3, by the config's names."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    head_dim: int = 128

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's Hugging Face name and shape."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for name, shape in self._layer().items():
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def _layer(self) -> dict[str, tuple[int, ...]]:
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (heads, self.hidden),
            "self_attn.k_proj": (kv_heads, self.hidden),
            "self_attn.v_proj": (kv_heads, self.hidden),
            "self_attn.o_proj": (self.hidden, heads),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def config(self) -> dict[str, object]:
        """What config.json says."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
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


MIDDLE = Qwen3Shape(hidden=4096, layers=8, heads=32, kv_heads=8, mlp=12288, vocab=32000)
"""3.6 GiB: large enough for real allocations, small enough to be compared with a load from disk."""
QWEN3_8B = Qwen3Shape(hidden=4096, layers=36, heads=32, kv_heads=8, mlp=12288, vocab=151936)
"""15.26 GiB, 399 tensors: the shape of Qwen3-8B."""
SHAPES = {"middle": MIDDLE, "8b": QWEN3_8B}


def random_weights(shape: Qwen3Shape, seed: int, device: torch.device) -> NamedTensors:
    """All tensors in bfloat16, made on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    return [(name, _random(size, generator, device)) for name, size in shape.tensors()]


def _random(size: tuple[int, ...], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    noise = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
    return noise + 1 if len(size) == 1 else noise  # the one-dimensional tensors are all norms


def write_config(shape: Qwen3Shape, folder: Path) -> Path:
    """A model folder without weights, for ``--load-format dummy``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return folder


def save_checkpoint(shape: Qwen3Shape, weights: NamedTensors, folder: Path) -> Path:
    """A model folder with these weights, as SGLang reads it from disk."""
    write_config(shape, folder)
    save_file(dict(weights), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
