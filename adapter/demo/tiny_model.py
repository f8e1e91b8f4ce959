"""The model of the demo and of the end-to-end tests: a Qwen3 of 1.4 MB with random weights.

Owns its config, the Hugging Face names and shapes of its tensors, and how a seed becomes weights. Invariant: one seed
gives the same bytes in every process and on every device, so that ranks agree without talking to each other.
Transformers is not needed: a trainer that has only torch can use it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

NamedTensors = list[tuple[str, torch.Tensor]]

_VOCAB = 512
_HIDDEN = 128
_LAYERS = 4
_HEADS = 4
_KV_HEADS = 2
_HEAD_DIM = 32
_MLP = 256
# Large enough that greedy tokens depend on the weights instead of on rounding.
_STD = 0.2

_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": _VOCAB,
    "hidden_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "intermediate_size": _MLP,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": _STD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

_LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    "input_layernorm": (_HIDDEN,),
    "self_attn.q_proj": (_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.k_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.v_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HEADS * _HEAD_DIM),
    "self_attn.q_norm": (_HEAD_DIM,),
    "self_attn.k_norm": (_HEAD_DIM,),
    "post_attention_layernorm": (_HIDDEN,),
    "mlp.gate_proj": (_MLP, _HIDDEN),
    "mlp.up_proj": (_MLP, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _MLP),
}


def tensor_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's Hugging Face name and shape, in the checkpoint's order."""
    yield "model.embed_tokens.weight", (_VOCAB, _HIDDEN)
    for layer in range(_LAYERS):
        for name, shape in _LAYER_SHAPES.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (_VOCAB, _HIDDEN)


def random_weights(seed: int, device: str = "cpu") -> NamedTensors:
    """All tensors in bfloat16. Made on the CPU, whose generator gives the same numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return [(name, _random_tensor(shape, generator).to(device)) for name, shape in tensor_shapes()]


def _random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator) * _STD
    norm_scale = 1.0 if len(shape) == 1 else 0.0  # the one-dimensional tensors are all norms
    return (noise + norm_scale).to(torch.bfloat16)


def write_config(folder: Path) -> Path:
    """Makes a model folder without weights, for `--load-format dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=1))
    return folder


def save_checkpoint(folder: Path, weights: NamedTensors) -> Path:
    """Makes a model folder with these weights, as SGLang reads it from disk."""
    write_config(folder)
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in weights}
    save_file(on_cpu, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
