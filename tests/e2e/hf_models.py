"""Small Hugging Face models with random weights, of the architectures that RL trains most, and a tokenizer for them.

Owns the configurations. Invariant: a folder that is written here holds no weights: what a server answers correctly, it
was sent.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 512
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far enough apart that greedy tokens do not hang on rounding
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DENSE: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 256}

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**_DENSE, head_dim=32, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**_DENSE, tie_word_embeddings=True),
    "llama": LlamaConfig(**_DENSE, tie_word_embeddings=False),
    "qwen3-moe": Qwen3MoeConfig(
        **_DENSE, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "deepseek-v2": DeepseekV2Config(
        **_COMMON, num_key_value_heads=4, intermediate_size=256, moe_intermediate_size=64, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_group=1, topk_group=1, moe_layer_freq=1,
        scoring_func="softmax", topk_method="greedy",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    ),
}  # fmt: skip


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    return model.to(dtype).eval()


def write_folder(name: str, folder: Path, dtype: str = "bfloat16") -> Path:
    """A model folder without weights: config and a tokenizer of one word per token id."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name].to_dict() | {"architectures": [_architecture(name)], "torch_dtype": dtype, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def text_of(tokens: list[int]) -> str:
    """What the tokenizer turns into these ids."""
    return " ".join(f"t{token}" for token in tokens)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """The model's own greedy tokens, and the log-probability of each."""
    tokens, logprobs = list(prompt), []
    for _ in range(num_tokens):
        scores = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
        best = int(scores.argmax())
        tokens.append(best)
        logprobs.append(float(scores[best]))
    return tokens[len(prompt) :], logprobs


def _architecture(name: str) -> str:
    return type(AutoModelForCausalLM.from_config(CONFIGS[name])).__name__


def _tokenizer() -> dict[str, Any]:
    vocabulary = {f"t{token}": token for token in range(VOCAB)}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }  # fmt: skip
