"""A merge on the way gives what peft itself merges, and leaves the trainer's weights alone."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapter.sources import MergedLora, NamedTensors, as_lazy, lora_adapter, merged_lora

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MODULES = ["q_proj", "v_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SMALL)).to(dtype)


def with_lora(base: nn.Module, **options: object) -> peft.PeftModel:
    """Adapters of random values: a fresh B is zero, and would merge to nothing."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": MODULES, **options})
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def arrived(pairs: NamedTensors) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, value in pairs:
        lazy = as_lazy(value)
        tensors[name] = torch.empty(lazy.shape, dtype=lazy.dtype)
        lazy.write(tensors[name])
    return tensors


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["lm_head", "q_proj"]}], ids=str)
def test_merged_weights_are_those_that_peft_merges(options: dict[str, object]) -> None:
    model = with_lora(llama(), **options)
    sent = arrived(merged_lora(model))
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert list(sent) == list(merged)
    for name, expected in merged.items():
        torch.testing.assert_close(sent[name], expected, msg=name)
    untouched = {name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in model.state_dict()}
    assert set(sent) <= untouched


def test_half_precision_is_merged_as_peft_does_it() -> None:
    model = with_lora(llama(torch.bfloat16))
    sent = arrived(merged_lora(model))
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert sent[name].dtype == torch.bfloat16
    torch.testing.assert_close(sent[name], merged[name])


def test_a_transposed_layer_is_merged_the_other_way_round() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    model = with_lora(base, target_modules=["c_attn"], fan_in_fan_out=True)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(arrived(merged_lora(model))[name], merged[name])


def test_the_trainers_weights_stay_as_they_are() -> None:
    model = with_lora(llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arrived(merged_lora(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_cast_is_applied_after_the_merge() -> None:
    model = with_lora(llama())
    sent = arrived(merged_lora(model, dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    differs = (sent[name] != merged[name].bfloat16()).float().mean()
    assert differs < 0.01, "rounded once, but for the last bit of the product"


def test_an_adapter_under_activation_checkpointing_is_merged_too() -> None:
    model = with_lora(llama())
    plain = arrived(merged_lora(model))
    for layer in range(2):
        layers = model.base_model.model.model.layers
        layers[layer] = checkpoint_wrapper(layers[layer])
    wrapped = arrived(merged_lora(model))
    assert wrapped.keys() == plain.keys()
    assert all(torch.equal(wrapped[name], tensor) for name, tensor in plain.items())


def test_what_was_trained_in_place_of_a_module_is_sent_under_its_name() -> None:
    model = with_lora(llama(), modules_to_save=["lm_head"])
    torch.nn.init.ones_(model.base_model.model.lm_head.modules_to_save.default.weight)
    sent = arrived(merged_lora(model))
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert sent.keys() == merged.keys()
    assert torch.equal(sent["lm_head.weight"], merged["lm_head.weight"])


def test_an_adapter_that_is_merged_already_is_not_added_twice() -> None:
    model = with_lora(llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weights already; call unmerge_adapter"):
        merged_lora(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"use_dora": True}, "only plain LoRA of linear layers"), ({"lora_bias": True}, "without lora_bias")],
    ids=["dora", "bias"],
)
def test_what_is_more_than_b_times_a_is_refused(options: dict[str, object], words: str) -> None:
    base = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, attention_bias=True, **SMALL))
    model = with_lora(base, target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=words):
        merged_lora(model)


@pytest.mark.parametrize("pick", [merged_lora, lora_adapter])
def test_an_adapter_that_is_not_there_is_an_error(pick: object) -> None:
    assert callable(pick)
    with pytest.raises(ValueError, match="the model has no LoRA adapter called 'other'"):
        pick(with_lora(llama()), adapter="other")


def test_an_adapter_alone_has_the_names_of_its_checkpoint() -> None:
    model = with_lora(llama())
    assert dict(lora_adapter(model)).keys() == peft.get_peft_model_state_dict(model).keys()


def test_what_a_merge_takes_is_said() -> None:
    base, a, b = torch.zeros(8, 4), torch.zeros(2, 4), torch.zeros(8, 2)
    assert MergedLora(base, a, b, 1.0).extra_bytes >= 8 * 4 * 4
