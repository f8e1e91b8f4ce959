"""Modules, state dicts and pairs become what is sent, under the engine's names."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from adapter.sources import NamedTensors, PlainTensor, as_lazy, named_weights, unstack_experts


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(3))


def qwen2(*, tied: bool) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip


@pytest.mark.parametrize("as_pairs", [False, True])
def test_a_module_is_sent_as_its_state_dict(as_pairs: bool) -> None:
    module = Small()
    source: NamedTensors | nn.Module = list(module.state_dict().items()) if as_pairs else module
    sent = dict(named_weights(source))
    assert list(sent) == list(module.state_dict())
    assert all(isinstance(value, PlainTensor) for value in sent.values())


def test_floating_point_tensors_are_cast_and_others_are_not() -> None:
    dtypes = {name: value.dtype for name, value in named_weights(Small(), dtype=torch.bfloat16)}
    assert dtypes == {"linear.weight": torch.bfloat16, "linear.bias": torch.bfloat16, "count": torch.int64}


def test_a_name_map_renames_and_leaves_out() -> None:
    renamed = named_weights(Small(), name_map=lambda name: None if name == "count" else f"model.{name}")
    assert [name for name, _ in renamed] == ["model.linear.weight", "model.linear.bias"]


def test_tied_embeddings_are_sent_once_where_the_config_says_that_they_are() -> None:
    tied, untied = dict(named_weights(qwen2(tied=True))), dict(named_weights(qwen2(tied=False)))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


def test_what_is_no_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match="a list cannot be sent: give a tensor, a DTensor or a LazyTensor"):
        as_lazy([1.0])  # type: ignore[arg-type]


def test_experts_that_are_not_stacked_pass() -> None:
    pairs: NamedTensors = [("mlp.experts.0.gate_proj.weight", torch.ones(2, 2)), ("mlp.gate.weight", torch.ones(2, 2))]
    assert unstack_experts(pairs) == pairs


def test_a_stack_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj must be a tensor \[experts, rows, columns\]"):
        unstack_experts([("mlp.experts.down_proj", torch.ones(2, 2))])
