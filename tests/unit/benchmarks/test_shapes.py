"""Shapes have the tensors of the models that they are named for."""

import json
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import MODELS, random_weights


@pytest.mark.parametrize(
    ("model", "tensors", "gib"),
    [("dense-8b", 399, 15.26), ("moe-12l", 4719, 15.09), ("moe-48l", 18867, 10.06)],
)
def test_a_shape_has_as_many_tensors_and_bytes_as_its_model(model: str, tensors: int, gib: float) -> None:
    shapes = dict(MODELS[model].tensors())
    assert len(shapes) == tensors
    assert sum(map(prod, shapes.values())) * 2 / 2**30 == pytest.approx(gib, abs=0.01)


def test_one_seed_gives_the_same_weights_in_memory_of_their_own() -> None:
    first, second = (random_weights(MODELS["moe-tiny"], 1, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(first, second, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in first}) == len(first)


def test_a_config_names_the_architecture_and_only_a_moe_has_experts(tmp_path: Path) -> None:
    dense = json.loads((MODELS["dense-tiny"].write_config(tmp_path / "a") / "config.json").read_text())
    moe = json.loads((MODELS["moe-tiny"].write_config(tmp_path / "b") / "config.json").read_text())
    assert (dense["architectures"], moe["architectures"]) == (["Qwen3ForCausalLM"], ["Qwen3MoeForCausalLM"])
    assert ("num_experts" in dense, moe["num_experts"]) == (False, 32)
