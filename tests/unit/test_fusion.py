"""What must travel together, held to what the sidecar refuses to see apart."""

from itertools import combinations

import pytest

from adapter.fusion import DEFAULT_RULES, compile_rules, group_names
from sidecar import manifest_check
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.manifest_check import Allowance, FindingKind

LAYER = "model.layers.3.self_attn"
FUSED = [
    [f"{LAYER}.q_a_proj.weight", f"{LAYER}.kv_a_proj_with_mqa.weight"],
    [f"{LAYER}.q_a_proj.weight_scale_inv", f"{LAYER}.kv_a_proj_with_mqa.weight_scale_inv"],
    ["layers.3.attention.wq_a.weight", "layers.3.attention.wkv_a_with_mqa.weight"],
    ["layers.3.attn.wq_a.weight", "layers.3.attn.wkv.weight"],
    ["layers.3.attn.compressor.wkv.weight", "layers.3.attn.compressor.wgate.weight"],
    ["layers.3.attn.wo_a.weight", "layers.3.attn.wo_a.scale"],
    [f"{LAYER}.indexer.wk.weight", f"{LAYER}.indexer.wk.weight_scale_inv"],
    [f"{LAYER}.indexer.weights_proj.weight", f"{LAYER}.indexer.weights_proj.weight_scale_inv"],
]


@pytest.mark.parametrize("names", FUSED, ids=lambda names: names[0])
def test_what_the_sidecar_refuses_apart_is_kept_together(names: list[str]) -> None:
    assert _is_refused_apart(names)
    assert group_names(["before", names[0], "between", *names[1:]]) == [[0], [1, *range(3, 2 + len(names))], [2]]


@pytest.mark.parametrize(
    "names",
    [
        [f"{LAYER}.q_a_proj.weight", "model.layers.4.self_attn.kv_a_proj_with_mqa.weight"],
        [f"{LAYER}.q_a_proj.weight", f"{LAYER}.kv_a_proj_with_mqa.weight_scale_inv"],
        [f"{LAYER}.q_proj.weight", f"{LAYER}.k_proj.weight"],
        ["model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"],
    ],
    ids=["other-layers", "weight-and-scale", "q-and-k", "dense-gate-and-up"],
)
def test_what_is_loaded_one_by_one_may_part(names: list[str]) -> None:
    assert not _is_refused_apart(names)
    assert group_names(names) == [[0], [1]]


def test_a_shared_experts_gate_and_up_stay_together() -> None:
    names = [f"model.layers.1.mlp.shared_experts.{part}_proj.weight" for part in ("gate", "down", "up")]
    assert group_names(names) == [[0, 2], [1]]


def test_groups_that_share_a_tensor_are_one() -> None:
    names = [f"layers.0.attn.{part}.weight" for part in ("wkv", "wkv_a_with_mqa", "wq_a")]
    assert group_names(names) == [[0, 1, 2]]


def test_further_groups_can_be_added() -> None:
    rules = (*DEFAULT_RULES, *compile_rules([r"\.(?P<part>left|right)$"]))
    assert group_names(["a.left", "b.left", "a.right"], rules) == [[0, 2], [1]]


def test_a_rule_without_a_part_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"left\|right.* has no \(\?P<part>\.\.\.\)"):
        compile_rules(["left|right"])


def test_every_group_that_all_architectures_have_is_in_both_tables() -> None:
    general = [rule for rule in manifest_check._RULES if not rule.only]
    ours = {rule.pattern for rule in DEFAULT_RULES}
    assert {rule.pattern.pattern for rule in general} <= ours


def _is_refused_apart(names: list[str]) -> bool:
    """Whether the sidecar refuses any two of these in two buckets."""
    return all(_refuses(pair) for pair in combinations(names, 2))


def _refuses(names: tuple[str, ...]) -> bool:
    tensors = [TensorSpec(name=name, dtype="uint8", shape=(1,), byte_offset=0, size_bytes=1) for name in names]
    manifest = Manifest(tuple(BucketSpec(size_bytes=64, tensors=(tensor,)) for tensor in tensors))
    report = manifest_check.check(manifest, None, Allowance())
    return [finding.kind for finding in report.errors] == [FindingKind.FUSED_GROUP_SPLIT]
