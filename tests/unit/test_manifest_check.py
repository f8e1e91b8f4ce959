"""Every finding of a dry run, every exception to it, and what it says it could not check."""

import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from adapter import planner, wire
from adapter.demo import tiny_model
from sidecar import checkpoint, convert
from sidecar.checkpoint import Checkpoint, KnownTensor
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.manifest_check import Allowance, Finding, FindingKind, Reference, Report, Severity, check
from sidecar.v1 import weight_sync_pb2 as pb

SOURCE = "checkpoint /models/x"
NO_EXCEPTION = Allowance()
MATRIX = KnownTensor("bfloat16", (4, 3))
ATTENTION = "model.layers.0.self_attn."


def manifest_of(*buckets: Iterable[str], dtype: str = "bfloat16", shape: tuple[int, ...] = (4, 3)) -> Manifest:
    """Offsets do not matter to a dry run."""
    return Manifest(
        tuple(BucketSpec(64, tuple(TensorSpec(name, dtype, shape, 0, 24) for name in names)) for names in buckets)
    )


def model(
    *names: str,
    tied: bool = False,
    layers: int | None = None,
    nextn: int | None = None,
    architecture: str = "Qwen3ForCausalLM",
    tensor: KnownTensor = MATRIX,
) -> Reference:
    known = Checkpoint(
        tensors=dict.fromkeys(names, tensor),
        tied_embeddings=tied,
        num_hidden_layers=layers,
        num_nextn_predict_layers=nextn,
        architectures=(architecture,) if architecture else (),
    )
    return Reference.of_checkpoint(known, SOURCE)


def only_finding(report: Report) -> Finding:
    assert len(report.findings) == 1, report.findings
    return report.findings[0]


def kinds(report: Report) -> list[str]:
    return [finding.kind.value for finding in report.findings]


def planned(bucket_bytes: int) -> Manifest:
    specs = [planner.TensorSpec(name, torch.bfloat16, shape) for name, shape in tiny_model.tensor_shapes()]
    return convert.manifest(wire.manifest(planner.plan(specs, bucket_bytes)))


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 16, 1 << 24])
def test_the_tiny_models_own_update_has_no_finding_against_its_checkpoint(tmp_path: Path, bucket_bytes: int) -> None:
    folder = tiny_model.save_checkpoint(tmp_path, tiny_model.random_weights(1))
    reference = Reference.of_checkpoint(checkpoint.read(folder), f"checkpoint {folder}")
    report = check(planned(bucket_bytes), reference, NO_EXCEPTION)
    assert report == Report(findings=(), sources=(f"checkpoint {folder}",), unchecked=())
    assert report.errors == ()


def test_a_name_that_the_model_does_not_have_is_an_error() -> None:
    report = check(manifest_of(["a", "model.extra", "other"]), model("a"), NO_EXCEPTION)
    assert only_finding(report) == Finding(
        Severity.ERROR,
        FindingKind.UNKNOWN_TENSOR,
        ("model.extra", "other"),
        "2 tensors are not in checkpoint /models/x, the first 'model.extra': SGLang skips them without an error, or "
        "dies; leave them out, or allow them by name",
    )
    assert report.errors == report.findings
    assert report.sources == (SOURCE,)


def test_a_tensor_of_the_model_that_is_not_sent_is_an_error() -> None:
    assert only_finding(check(manifest_of(["a"]), model("a", "model.b"), NO_EXCEPTION)) == Finding(
        Severity.ERROR,
        FindingKind.MISSING_TENSOR,
        ("model.b",),
        "1 tensor is in checkpoint /models/x but not in the manifest, the first 'model.b': they would keep their old "
        "weights; send them, or allow them by name",
    )


@pytest.mark.parametrize(
    ("allowed", "left"),
    [
        pytest.param((), ["visual.0.w", "visual.1.w", "w"], id="nothing"),
        pytest.param(("w",), ["visual.0.w", "visual.1.w"], id="by-name"),
        pytest.param(("visual.*",), ["w"], id="by-pattern"),
        pytest.param(("visual.?.w",), ["w"], id="by-one-character"),
        pytest.param(("visual.[0].w",), ["visual.1.w", "w"], id="by-class"),
        pytest.param(("VISUAL.*", "W"), ["visual.0.w", "visual.1.w", "w"], id="case-matters"),
        pytest.param(("visual", "isual.*"), ["visual.0.w", "visual.1.w", "w"], id="the-whole-name-must-match"),
        pytest.param(("visual.*", "w"), [], id="both"),
        pytest.param(("*",), [], id="everything"),
    ],
)
def test_names_are_allowed_one_by_one_or_by_pattern(allowed: tuple[str, ...], left: list[str]) -> None:
    names = ["visual.0.w", "visual.1.w", "w"]
    unknown = check(manifest_of(["a", *names]), model("a"), Allowance(unknown=allowed))
    missing = check(manifest_of(["a"]), model("a", *names), Allowance(missing=allowed))
    assert [list(finding.tensors) for finding in unknown.findings] == ([left] if left else [])
    assert [list(finding.tensors) for finding in missing.findings] == ([left] if left else [])


def test_what_may_be_unknown_may_not_be_missing_and_the_reverse() -> None:
    assert kinds(check(manifest_of(["a"]), model("a", "b"), Allowance(unknown=("*",)))) == ["MISSING_TENSOR"]
    assert kinds(check(manifest_of(["a", "b"]), model("a"), Allowance(missing=("*",)))) == ["UNKNOWN_TENSOR"]


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_that_is_the_embedding_is_neither_unknown_nor_missing(head: str) -> None:
    assert check(manifest_of(["a", head]), model("a", tied=True), NO_EXCEPTION).findings == ()
    reference = model("a", head, tied=True)
    assert check(manifest_of(["a"]), reference, NO_EXCEPTION).findings == ()
    assert kinds(check(manifest_of(["a", head], shape=(3, 4)), reference, NO_EXCEPTION)) == ["SHAPE_MISMATCH"]


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.bias", "my_lm_head.weight"])
def test_a_head_of_its_own_is_checked_like_the_rest(name: str) -> None:
    tied = name != "lm_head.weight"
    assert kinds(check(manifest_of(["a", name]), model("a", tied=tied), NO_EXCEPTION)) == ["UNKNOWN_TENSOR"]
    assert kinds(check(manifest_of(["a"]), model("a", name, tied=tied), NO_EXCEPTION)) == ["MISSING_TENSOR"]


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"])
def test_tables_that_no_model_loads_are_neither_unknown_nor_missing(name: str) -> None:
    assert check(manifest_of(["a", ATTENTION + name]), model("a"), NO_EXCEPTION).findings == ()
    assert check(manifest_of(["a"]), model("a", ATTENTION + name), NO_EXCEPTION).findings == ()


@pytest.mark.parametrize(
    ("name", "layers", "nextn", "may_miss"),
    [
        pytest.param("model.layers.61.eh_proj.weight", 61, 1, True, id="the-layer-after-the-last"),
        pytest.param("model.layers.62.eh_proj.weight", 61, 1, True, id="one-further"),
        pytest.param("language_model.model.layers.61.eh_proj.weight", 61, 1, True, id="in-a-multimodal-model"),
        pytest.param("model.language_model.layers.61.eh_proj.weight", 61, 1, True, id="in-another-one"),
        pytest.param("model.layers.60.eh_proj.weight", 61, 1, False, id="the-last-layer"),
        pytest.param("model.layers.61.eh_proj.weight", 61, 0, False, id="no-draft-layers"),
        pytest.param("model.layers.61.eh_proj.weight", 61, None, False, id="draft-layers-unknown"),
        pytest.param("model.layers.61.eh_proj.weight", None, 1, False, id="layers-unknown"),
        pytest.param("vision_tower.encoder.layers.61.w", 61, 1, False, id="another-tower"),
        pytest.param("mtp.layers.0.w", None, None, True, id="mtp"),
        pytest.param("model.mtp_layers.0.w", None, None, True, id="mtp-layers"),
        pytest.param("model.layers.0.mtp_gate.w", 61, 1, False, id="not-mtp"),
    ],
)
def test_layers_of_the_draft_model_may_be_missing(
    name: str, layers: int | None, nextn: int | None, may_miss: bool
) -> None:
    report = check(manifest_of(["a"]), model("a", name, layers=layers, nextn=nextn), NO_EXCEPTION)
    assert kinds(report) == ([] if may_miss else ["MISSING_TENSOR"])
    said = (
        "Whether the engine has a draft model was not checked: 1 tensor is of draft layers in checkpoint /models/x but "
        f"not in the manifest, the first {name!r}."
    )
    assert report.unchecked == ((said,) if may_miss else ())


def test_layers_of_the_draft_model_are_unknown_only_if_the_checkpoint_lacks_them() -> None:
    names = ["model.layers.0.w", "model.layers.1.w", "mtp.0.w"]
    assert check(manifest_of(names), model(*names, layers=1, nextn=1), NO_EXCEPTION) == Report((), (SOURCE,), ())
    lacking = model(*names[:1], layers=1, nextn=1)
    assert only_finding(check(manifest_of(names), lacking, NO_EXCEPTION)).tensors == tuple(names[1:])


def test_another_shape_is_an_error_with_both() -> None:
    report = check(manifest_of(["a"], ["b"], shape=(3, 4)), model("a", "b"), NO_EXCEPTION)
    assert only_finding(report) == Finding(
        Severity.ERROR,
        FindingKind.SHAPE_MISMATCH,
        ("a", "b"),
        "2 tensors are of another shape than in checkpoint /models/x; the first, 'a', is expected as [4, 3] and sent "
        "as [3, 4]: SGLang's scheduler would die",
    )


def test_another_dtype_is_a_warning_with_both() -> None:
    report = check(manifest_of(["a"], dtype="float32"), model("a"), NO_EXCEPTION)
    assert only_finding(report) == Finding(
        Severity.WARNING,
        FindingKind.DTYPE_DIFFERS,
        ("a",),
        "1 tensor is of another dtype than in checkpoint /models/x; the first, 'a', is expected as bfloat16 and sent "
        "as float32: SGLang casts while it copies",
    )
    assert report.errors == ()


@pytest.mark.parametrize(
    ("known", "sent", "same"),
    [
        *[((), (), True), ((), (1,), True), ((1, 1), (), True), ((2, 3), (2, 3), True)],
        *[((), (0,), False), ((0, 3), (3, 0), False), ((6,), (2, 3), False), ((2, 3), (2, 3, 1), False)],
    ],
)
def test_only_a_single_element_may_have_another_shape(
    known: tuple[int, ...], sent: tuple[int, ...], same: bool
) -> None:
    reference = model("a", tensor=KnownTensor("bfloat16", known))
    assert kinds(check(manifest_of(["a"], shape=sent), reference, NO_EXCEPTION)) == ([] if same else ["SHAPE_MISMATCH"])


def test_a_dtype_that_only_the_checkpoint_has_differs() -> None:
    report = check(manifest_of(["a"], dtype="uint8"), model("a", tensor=KnownTensor("F4", (4, 3))), NO_EXCEPTION)
    assert "expected as F4 and sent as uint8" in only_finding(report).message


def test_there_is_one_finding_of_each_kind_in_a_fixed_order() -> None:
    reference = model("a", "b")
    manifest = manifest_of(
        ["a", "new", "x.q_a_proj.weight"], ["x.kv_a_proj_with_mqa.weight"], dtype="float16", shape=(9,)
    )
    assert kinds(check(manifest, reference, NO_EXCEPTION)) == list(FindingKind)


def test_a_finding_lists_the_first_tensors_and_counts_all() -> None:
    names = [f"new.{number}" for number in range(25)]
    finding = only_finding(check(manifest_of(["a", *names]), model("a"), NO_EXCEPTION))
    assert finding.tensors == tuple(names[:20])
    assert finding.message.startswith("25 tensors are not in")


PAIRS = [
    (f"model.layers.0.{prefix}.{one}", f"model.layers.0.{prefix}.{other}")
    for prefix, one, other in [
        ("self_attn", "q_a_proj.weight", "kv_a_proj_with_mqa.weight"),
        ("self_attn", "q_a_proj.weight_scale_inv", "kv_a_proj_with_mqa.weight_scale_inv"),
        ("self_attn.0", "q_a_proj.bias", "kv_a_proj_with_mqa.bias"),
        ("attention", "wq_a.weight", "wkv_a_with_mqa.weight"),
        ("attn", "wq_a.weight", "wkv.weight"),
        ("attn", "wq_a.scale", "wkv.scale"),
        ("attn.compressor", "wkv.weight", "wgate.weight"),
        ("attn.indexer.compressor", "wkv.weight", "wgate.weight"),
        ("attn", "wo_a.weight", "wo_a.scale"),
        ("self_attn.indexer", "wk.weight", "wk.weight_scale_inv"),
        ("self_attn.indexer", "weights_proj.weight", "weights_proj.weight_scale"),
    ]
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("known", [True, False], ids=["against-a-checkpoint", "against-nothing"])
def test_a_pair_that_is_fused_must_be_in_one_bucket(pair: tuple[str, str], known: bool) -> None:
    reference = model("a", *pair) if known else None
    for first, second in (pair, pair[::-1]):
        report = check(manifest_of([first], ["a"], [second]), reference, NO_EXCEPTION)
        assert only_finding(report) == Finding(
            Severity.ERROR,
            FindingKind.FUSED_GROUP_SPLIT,
            (first, second),
            "1 group of tensors that SGLang takes together or not at all (2 tensors), "
            f"the first {first!r} in bucket 0 and {second!r} in bucket 2: it would drop them without an error, or die; "
            "put each group into one bucket",
        )
    assert check(manifest_of(["a"], pair), reference, NO_EXCEPTION).findings == ()


@pytest.mark.parametrize(
    "apart",
    [
        pytest.param(("x.0.q_a_proj.weight", "x.1.kv_a_proj_with_mqa.weight"), id="other-layer"),
        pytest.param(("x.q_a_proj.weight", "x.kv_a_proj_with_mqa.weight_scale_inv"), id="other-suffix"),
        pytest.param(("x.q_a_layernorm.weight", "x.kv_a_layernorm.weight"), id="norms"),
        pytest.param(("x.q_proj.weight", "x.kv_a_proj_with_mqa.weight"), id="without-a-low-rank-query"),
        pytest.param(("x.self_attn.q_proj.weight", "x.self_attn.k_proj.weight"), id="qkv"),
        pytest.param(("x.mlp.gate_proj.weight", "x.mlp.up_proj.weight"), id="gate-and-up"),
        pytest.param(("x.kv_b_proj.weight", "x.kv_b_proj.weight_scale_inv"), id="weight-and-scale"),
        pytest.param(("x.qkv_proj.weight", "x.qkv_proj.weight_scale_inv"), id="qkv-weight-and-scale"),
        pytest.param(("x.attn.wkv.weight", "x.attn.compressor.wkv.weight"), id="wkv-and-its-compressor"),
    ],
)
def test_tensors_that_are_loaded_one_by_one_may_be_apart(apart: tuple[str, str]) -> None:
    assert check(manifest_of(apart[:1], apart[1:]), model(*apart), NO_EXCEPTION).findings == ()


def test_all_split_groups_are_one_finding_in_the_models_order() -> None:
    queries = [f"model.layers.{layer}.self_attn.q_a_proj.weight" for layer in range(30)]
    rest = [name.replace("q_a_proj", "kv_a_proj_with_mqa") for name in queries]
    finding = only_finding(check(manifest_of(queries, rest), None, NO_EXCEPTION))
    assert finding.tensors == tuple(name for pair in zip(queries, rest, strict=True) for name in pair)[:20]
    assert finding.message.startswith("30 groups of tensors that SGLang takes together or not at all (60 tensors)")


@pytest.mark.parametrize("architecture", ["MiniCPM3ForCausalLM", "SarvamMLAForCausalLM", "KimiK3LinearForCausalLM"])
def test_models_that_load_the_parts_one_by_one_may_have_them_apart(architecture: str) -> None:
    one, other = PAIRS[0]
    reference = model(one, other, architecture=architecture)
    assert check(manifest_of([one], [other]), reference, NO_EXCEPTION).findings == ()


@pytest.mark.parametrize(
    ("architecture", "parts"),
    [
        ("Sarashina2VisionForCausalLM", [f"llm.model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]),
        ("Sarashina2VisionForCausalLM", [f"llm.model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up")]),
        ("MiniMaxM3SparseForConditionalGeneration", [f"vision_tower.x.0.self_attn.{p}_proj.bias" for p in "qkv"]),
        ("MiMoV2FlashForCausalLM", [f"model.layers.0.self_attn.qkv_proj.{p}" for p in ("weight", "weight_scale_inv")]),
        ("Grok1ForCausalLM", ["model.norm.weight", "lm_head.weight"]),
        ("Step3p5ForCausalLM", ["model.norm.weight", "lm_head.weight"]),
    ],
)
def test_some_architectures_fuse_what_others_do_not(architecture: str, parts: list[str]) -> None:
    manifest = manifest_of(parts[:-1], parts[-1:])
    theirs = check(manifest, model(*parts, architecture=architecture), NO_EXCEPTION)
    assert only_finding(theirs).tensors == tuple(parts)
    assert check(manifest_of(parts), model(*parts, architecture=architecture), NO_EXCEPTION).findings == ()
    assert check(manifest, model(*parts), NO_EXCEPTION).findings == ()
    assert check(manifest, None, NO_EXCEPTION).findings == ()


def test_the_language_model_beside_a_fused_vision_tower_is_loaded_one_by_one() -> None:
    parts = [f"language_model.model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    reference = model(*parts, architecture="MiniMaxM3SparseForConditionalGeneration")
    assert check(manifest_of(parts[:1], parts[1:]), reference, NO_EXCEPTION).findings == ()


def test_a_part_whose_counterpart_is_left_out_on_purpose_would_be_dropped_too() -> None:
    first, second = PAIRS[0]
    report = check(manifest_of([first, "a"]), model("a", first, second), Allowance(missing=("*.kv_a_proj_with_mqa.*",)))
    finding = only_finding(report)
    assert finding.kind is FindingKind.FUSED_GROUP_SPLIT
    assert f"the first {first!r} in bucket 0 and {second!r} not sent" in finding.message


def test_a_counterpart_that_was_forgotten_is_reported_once_as_missing() -> None:
    first, second = PAIRS[0]
    assert kinds(check(manifest_of([first]), model(first, second), NO_EXCEPTION)) == ["MISSING_TENSOR"]


def test_a_group_that_is_left_out_as_a_whole_is_not_split() -> None:
    assert check(manifest_of(["a"]), model("a", *PAIRS[0]), Allowance(missing=("model.*",))).findings == ()


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "scale" in pair[1] and pair[0].endswith(".weight")])
def test_a_weight_of_a_wider_type_does_without_its_scale(pair: tuple[str, str]) -> None:
    assert check(manifest_of(["a", pair[0]]), model("a", *pair), Allowance(missing=pair[1:])).findings == ()


def test_without_a_reference_only_fused_groups_are_checked_and_the_rest_is_said() -> None:
    assert check(manifest_of(["a"]), None, NO_EXCEPTION) == Report(
        findings=(),
        sources=(),
        unchecked=(
            "Names, missing tensors, shapes and dtypes were not checked: there is neither a readable checkpoint nor an "
            "earlier verified update to compare with.",
            "Fused groups that only some architectures have were not checked: the model's architecture is not known.",
        ),
    )


def test_an_earlier_update_is_compared_with_and_what_it_may_have_lacked_is_said() -> None:
    reference = Reference.of_manifest(manifest_of(["a"], ["b", "mtp.w"]), "update 12")
    assert check(manifest_of(["a", "b", "mtp.w"]), reference, NO_EXCEPTION) == Report(
        findings=(),
        sources=("update 12",),
        unchecked=(
            "What update 12 itself lacked, or had and the engine skipped, was not found: there is no readable "
            "checkpoint, so the manifest was compared with that update.",
            "Fused groups that only some architectures have were not checked: the model's architecture is not known.",
        ),
    )
    other = check(manifest_of(["a", "new"], shape=(1, 2)), reference, NO_EXCEPTION)
    assert kinds(other) == ["UNKNOWN_TENSOR", "MISSING_TENSOR", "SHAPE_MISMATCH"]
    assert other.findings[1].tensors == ("b", "mtp.w"), "an earlier update had them, so this one must"
    assert "not in update 12, the first 'new'" in other.findings[0].message


def test_a_checkpoint_of_unknown_architecture_says_so() -> None:
    (said,) = check(manifest_of(["a"]), model("a", architecture=""), NO_EXCEPTION).unchecked
    assert "the model's architecture is not known" in said


def test_severities_have_the_contracts_numbers() -> None:
    contract = {name.removeprefix("SEVERITY_"): number for name, number in pb.Severity.items() if number}
    assert {severity.name: severity.value for severity in Severity} == contract


def test_twenty_thousand_tensors_and_a_thousand_patterns_are_checked_within_seconds() -> None:
    names = [f"model.layers.{n // 300}.mlp.experts.{n % 300}.down_proj.weight" for n in range(20_000)]
    manifest = manifest_of(*(names[start : start + 100] for start in range(0, len(names), 100)))
    patterns = tuple(f"visual.{number}.*" for number in range(1_000))
    others = [f"visual.{number % 1_000}.{number}" for number in range(20_000)]
    began = time.monotonic()
    assert check(manifest, model(*names), Allowance(patterns, patterns)).findings == ()
    assert check(manifest, model(*names, *others), Allowance(patterns, patterns)).findings == ()
    assert time.monotonic() - began < 60, "half a second where nothing else runs"
