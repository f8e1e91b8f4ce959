"""What of a LoRA adapter is refused before an engine sees it: most of it would kill SGLang at the first request."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from sidecar import lora
from sidecar.checkpoint import KnownTensor
from sidecar.errors import InvalidRequest, Reason
from sidecar.lora import AdapterSpec
from sidecar.manifest import BucketSpec, Manifest, TensorSpec

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head"],
    "bias": "none",
    "rank_pattern": {},
    "init_lora_weights": True,
}
LAYER = "base_model.model.model.layers.0"
OUT, IN = 6, 10


def spec(**changes: Any) -> AdapterSpec:
    return lora.parse(json.dumps(CONFIG | changes), name="a", pinned=False, replace=True, rank=1)


def pair(module: str, r: int = 4, dtype: str = "float32") -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{module}.lora_A.weight": (dtype, (r, IN)), f"{module}.lora_B.weight": (dtype, (OUT, r))}


def manifest(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Manifest:
    listed, offset = [], 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * 4
        listed.append(TensorSpec(name, dtype, shape, offset, size))
        offset += size
    return Manifest((BucketSpec(offset, tuple(listed)),))


def refusal(tensors: Mapping[str, tuple[str, tuple[int, ...]]], **changes: Any) -> str:
    with pytest.raises(InvalidRequest) as raised:
        lora.check_tensors(spec(**changes), manifest(tensors), rank=1)
    assert raised.value.reason is Reason.INVALID_ADAPTER
    assert raised.value.message.startswith("rank 1: ")
    return raised.value.message


def test_the_engine_is_told_what_sglang_reads_and_nothing_else() -> None:
    modules = sorted(CONFIG["target_modules"])
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules}
    assert spec(some_field_of_the_future=10**40).engine_config() == expected


def test_rank_stabilised_scaling_is_told_as_the_alpha_that_gives_it() -> None:
    assert spec(use_rslora=True).alpha == pytest.approx(8 * math.sqrt(4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r must be"),
        ({"r": "8"}, "r must be"),
        ({"r": 10**30}, "r must be"),
        ({"r": True}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"target_modules": ".*q_proj"}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_a_config_that_sglang_cannot_serve_or_would_serve_wrong_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        spec(**changes)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, json.dumps(CONFIG | {"x": "y" * lora.MAX_CONFIG_BYTES})]
)
def test_a_config_that_is_no_json_object_of_bounded_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="config_json"):
        lora.parse(text, name="a", pinned=False, replace=True, rank=0)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 129])
def test_a_name_that_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="lora_name"):
        lora.check_name(name, "rank 0")


def test_a_whole_adapter_passes() -> None:
    modules = [f"{LAYER}.self_attn.{m}" for m in ("q_proj", "k_proj", "v_proj", "o_proj")]
    modules += [f"{LAYER}.mlp.{m}" for m in ("gate_proj", "up_proj")]
    tensors = {
        name: tensor for module in [*modules, "base_model.model.lm_head"] for name, tensor in pair(module).items()
    }
    lora.check_tensors(spec(), manifest(tensors), rank=0)


@pytest.mark.parametrize("kept", ["A", "B"])
def test_a_factor_without_its_partner_is_refused(kept: str) -> None:
    tensors = {name: tensor for name, tensor in pair(f"{LAYER}.self_attn.o_proj").items() if f"lora_{kept}" in name}
    assert f"has lora_{kept} without" in refusal(tensors)


def test_a_shape_that_is_not_of_the_configs_rank_is_refused() -> None:
    assert "must be [4, in]" in refusal(pair(f"{LAYER}.self_attn.o_proj", r=3))
    three = {f"{LAYER}.self_attn.o_proj.lora_A.weight": ("float32", (1, 4, IN))}
    assert "must be [4, in]" in refusal(pair(f"{LAYER}.self_attn.o_proj") | three)


def test_a_module_that_the_config_does_not_name_is_refused() -> None:
    assert "not among target_modules" in refusal(pair(f"{LAYER}.self_attn.o_proj"), target_modules=["q_proj"])


def test_a_full_module_path_in_target_modules_counts_by_its_last_part() -> None:
    named = spec(target_modules=["model.layers.0.self_attn.o_proj"])
    lora.check_tensors(named, manifest(pair(f"{LAYER}.self_attn.o_proj")), rank=0)


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("self_attn.k_proj", "q_proj and v_proj"),
        ("self_attn.v_proj", "q_proj"),
        ("self_attn.q_proj", "v_proj"),
        ("mlp.up_proj", "gate_proj"),
    ],
)
def test_a_part_of_what_sglang_fuses_is_refused_without_the_rest(module: str, missing: str) -> None:
    assert f"without {missing}," in refusal(pair(f"{LAYER}.{module}"))


@pytest.mark.parametrize("name", ["self_attn.o_proj.bias", "self_attn.o_proj.base_layer.weight", "lora_magnitude"])
def test_a_tensor_that_is_no_factor_is_refused(name: str) -> None:
    extra = {f"{LAYER}.{name}": ("float32", (3,))}
    assert "is no factor" in refusal(pair(f"{LAYER}.self_attn.o_proj") | extra)


def test_a_module_outside_the_layers_is_refused_since_sglang_skips_it() -> None:
    assert "in no layer" in refusal(pair("base_model.model.visual.o_proj"))


def test_integers_are_no_adapter() -> None:
    assert "int32" in refusal(pair(f"{LAYER}.self_attn.o_proj", dtype="int32"))


def test_shapes_that_the_model_does_not_have_are_refused_and_what_it_lacks_is_said() -> None:
    sent = manifest(pair(f"{LAYER}.self_attn.o_proj"))
    weight = "model.layers.0.self_attn.o_proj.weight"
    assert lora.check_model(sent, {weight: KnownTensor("bfloat16", (OUT, IN))}, 0) == []
    with pytest.raises(InvalidRequest, match=r"is for \[6, 10\], but the model's weight is \[6, 8\]"):
        lora.check_model(sent, {weight: KnownTensor("bfloat16", (OUT, 8))}, 0)
    (note,) = lora.check_model(sent, {"model.norm.weight": KnownTensor("bfloat16", (OUT,))}, 0)
    assert "not checked" in note


def test_a_vision_towers_layers_are_not_taken_for_the_models() -> None:
    known = {
        "language_model.model.layers.0.self_attn.o_proj.weight": KnownTensor("bfloat16", (OUT, IN)),
        "vision.layers.0.self_attn.o_proj.weight": KnownTensor("bfloat16", (3, 3)),
    }
    assert lora.check_model(manifest(pair(f"{LAYER}.self_attn.o_proj")), known, 0) == []


def test_an_expert_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no such expert"):
        lora.check_model(manifest(pair(f"{LAYER}.mlp.experts.9.down_proj")), {}, 0)
