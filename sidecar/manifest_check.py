"""What would be wrong with an update of a manifest, told before anything is loaded. Pure: no file, no engine.

Owns the comparison with what is known of the model, and the table of tensors that SGLang must be given together.
Invariant: the same arguments give the same report; what could not be compared is said in ``unchecked`` instead of
passing as good. Duplicate names and bytes that no engine could take are not its business: ``sidecar.manifest.check``
refuses those first.

Fused groups. SGLang calls a model's ``load_weights`` once per bucket, and some models collect tensors in a local dict
until a group is complete; what is left at the end of the call is dropped without a word, or kills the scheduler. Read
in releases 0.5.15.post1 (a), 0.5.20 (b) and 0.5.23 (c), srt/models:

    q_a_proj + kv_a_proj_with_mqa     abc  dropped  deepseek_common/deepseek_weight_loader.py (DeepSeek V2 to V3.2 and
                                                    all that inherit it), glm4_moe_lite.py, longcat_flash.py and
                                                    longcat_flash_nextn.py, bailing_moe_linear.py, kimi_k25_eagle3.py
                                       bc  dropped  bailing_moe_v3.py, glm5_next.py
                                                    not: minicpm3.py, sarvam_moe.py (abc), kimi_k3.py (bc)
    wq_a + wkv_a_with_mqa             abc  dropped  mistral_large_3.py, which renames them to the above
    wq_a + wkv                        abc  dies     deepseek_v4.py, cache_wqkv_a_weight
    compressor.wkv + .wgate           abc  dies     deepseek_v4.py, cache_compressor_weight
    wo_a.weight + .scale              abc  dies     deepseek_v4.py, _dequant_fp8_wo_a (_streaming); a bucket that holds
                                                    only weights loads wrong values instead
    indexer.wk, fp8 weight + scale    abc  dropped  deepseek_weight_loader.py, _load_fused_indexer_wk
    indexer.weights_proj, the same     bc  dropped  the same
    qkv_proj, weight + scale           bc  wrong    mimo_v2.py, deferred_qkv_scale_inv
    q_, k_, v_proj; gate_, up_proj    abc  dropped  sarashina2_vision.py
    q_, k_, v_proj of the ViT          bc  dropped  minimax_m3_vl.py, minimax_vl_common.py
    the whole model                   abc  dies     deepseek_ocr.py, unlimited_ocr.py, grok.py, laguna.py, step3p5.py,
                                                    whisper.py
                                       bc  dies     interns2_mobius.py, dots3_common/modeling.py
                                        c  dies     iquest_q1.py, bailing_mm.py, bailing_mm_v3.py

The other models there copy each tensor into its part of the fused parameter as it comes (Qwen, Llama, GLM-4, Gemma,
gpt-oss, ...). Models that only draft are not in the table.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from fnmatch import translate
from math import prod
from typing import NamedTuple

from sidecar.checkpoint import Checkpoint, KnownTensor
from sidecar.manifest import Manifest

MAX_TENSORS_LISTED = 20


class Severity(IntEnum):
    """How much a finding matters; the numbers are the contract's."""

    ERROR = 1
    """An update is refused for it."""
    WARNING = 2
    """An update is carried out; a person should know."""


class FindingKind(StrEnum):
    """Stable names of what was found, for programs."""

    UNKNOWN_TENSOR = "UNKNOWN_TENSOR"
    MISSING_TENSOR = "MISSING_TENSOR"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    DTYPE_DIFFERS = "DTYPE_DIFFERS"
    FUSED_GROUP_SPLIT = "FUSED_GROUP_SPLIT"


@dataclass(frozen=True, slots=True)
class Finding:
    """Everything of one kind that was found."""

    severity: Severity
    kind: FindingKind
    tensors: tuple[str, ...]
    """The first ``MAX_TENSORS_LISTED`` of them."""
    message: str
    """In a sentence, with the number of all."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """Exceptions: names, or patterns with * and ?."""

    unknown: tuple[str, ...] = ()
    """Tensors that the engine will skip."""
    missing: tuple[str, ...] = ()
    """Tensors that keep their old weights."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a check."""

    findings: tuple[Finding, ...]
    sources: tuple[str, ...]
    """What the manifest was compared with."""
    unchecked: tuple[str, ...]
    """What could not be checked, and why, in sentences."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings for which an update is refused."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)


class Checked(NamedTuple):
    """A report, and all that it hangs on: as long as that is the same, it holds."""

    about: object
    report: Report


@dataclass(frozen=True, slots=True)
class Reference:
    """What is known of the model's tensors, and from where."""

    source: str
    """Such as "checkpoint /models/x" or "update 12"."""
    tensors: Mapping[str, KnownTensor]
    checkpoint: Checkpoint | None = None
    """The config's facts; None if all that is known is a manifest."""

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, source: str) -> "Reference":
        """What the engine's own model folder says."""
        return cls(source, checkpoint.tensors, checkpoint)

    @classmethod
    def of_manifest(cls, manifest: Manifest, source: str) -> "Reference":
        """What an earlier update, verified since, consisted of."""
        return cls(source, {tensor.name: KnownTensor(tensor.dtype, tensor.shape) for tensor in manifest.tensors()})

    @property
    def architectures(self) -> frozenset[str]:
        """The model's classes; empty if unknown."""
        return frozenset(self.checkpoint.architectures if self.checkpoint else ())

    def is_optional(self, name: str) -> bool:
        """Tell whether it makes no difference if this tensor is sent."""
        tied = self.checkpoint is not None and self.checkpoint.tied_embeddings
        return bool(_NEVER_LOADED.search(name)) or (tied and bool(_LM_HEAD.search(name)))

    def is_of_draft(self, name: str) -> bool:
        """Tell whether only a draft model has this tensor, so that a target model's update need not."""
        config = self.checkpoint
        if config is None:  # an earlier update had it, for whichever model
            return False
        if _MTP.search(name):
            return True
        layer = _LAYER.search(name)
        if layer is None or config.num_hidden_layers is None or not config.num_nextn_predict_layers:
            return False
        return int(layer["number"]) >= config.num_hidden_layers


def check(manifest: Manifest, reference: Reference | None, allow: Allowance) -> Report:
    """Compare what would be sent with what is known. ``manifest`` has passed ``sidecar.manifest.check``."""
    sent = {tensor.name: KnownTensor(tensor.dtype, tensor.shape) for tensor in manifest.tensors()}
    findings = list(_compare(sent, reference, allow)) if reference is not None else []
    findings += _fused_groups(manifest, reference, allow)
    return Report(
        findings=tuple(findings),
        sources=(reference.source,) if reference is not None else (),
        unchecked=tuple(_unchecked(sent, reference)),
    )


# Skipped by every loader that was read; some checkpoints hold them.
_NEVER_LOADED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_LM_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
# Target models skip names with "mtp" (qwen3_next.py, qwen3_5.py, mimo.py, mimo_v2.py), whatever the config says.
_MTP = re.compile(r"(^|\.)mtp(_layers)?\.")
_LAYER = re.compile(r"(^|\.)model\.(language_model\.)?layers\.(?P<number>\d{1,9})\.")


def _compare(sent: Mapping[str, KnownTensor], reference: Reference, allow: Allowance) -> Iterator[Finding]:
    may_be_unknown, may_be_missing = matcher(allow.unknown), matcher(allow.missing)
    known, source = reference.tensors, reference.source
    unknown = [n for n in sent if n not in known and not reference.is_optional(n) and not may_be_unknown(n)]
    if unknown:
        advice = "SGLang skips them without an error, or dies; leave them out, or allow them by name"
        message = f"{_tensors(unknown)} not in {source}, the first {unknown[0]!r}: {advice}"
        yield _finding(Severity.ERROR, FindingKind.UNKNOWN_TENSOR, unknown, message)
    missing = [n for n in known if n not in sent and not _may_miss(n, reference) and not may_be_missing(n)]
    if missing:
        advice = "they would keep their old weights; send them, or allow them by name"
        message = f"{_tensors(missing)} in {source} but not in the manifest, the first {missing[0]!r}: {advice}"
        yield _finding(Severity.ERROR, FindingKind.MISSING_TENSOR, missing, message)
    both = [(name, known[name], tensor) for name, tensor in sent.items() if name in known]
    yield from _shapes(both, source)
    yield from _dtypes(both, source)


def _may_miss(name: str, reference: Reference) -> bool:
    return reference.is_optional(name) or reference.is_of_draft(name)


_Pairs = list[tuple[str, KnownTensor, KnownTensor]]


def _shapes(pairs: _Pairs, source: str) -> Iterator[Finding]:
    wrong = [pair for pair in pairs if not _same_shape(pair[1].shape, pair[2].shape)]
    if wrong:
        name, expected, sent = wrong[0]
        first = f"{name!r}, is expected as {list(expected.shape)} and sent as {list(sent.shape)}"
        message = (
            f"{_tensors(wrong)} of another shape than in {source}; the first, {first}: SGLang's scheduler would die"
        )
        yield _finding(Severity.ERROR, FindingKind.SHAPE_MISMATCH, [pair[0] for pair in wrong], message)


def _dtypes(pairs: _Pairs, source: str) -> Iterator[Finding]:
    other = [pair for pair in pairs if pair[1].dtype != pair[2].dtype]
    if other:
        name, expected, sent = other[0]
        first = f"{name!r}, is expected as {expected.dtype} and sent as {sent.dtype}"
        message = (
            f"{_tensors(other)} of another dtype than in {source}; the first, {first}: SGLang casts while it copies"
        )
        yield _finding(Severity.WARNING, FindingKind.DTYPE_DIFFERS, [pair[0] for pair in other], message)


def _same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    # default_weight_loader takes a single element in any shape (srt/model_loader/weight_utils.py).
    return one == other or (prod(one) == 1 and prod(other) == 1)


@dataclass(frozen=True, slots=True)
class _Rule:
    """Tensors whose names differ only in what the group ``part`` matches make one group."""

    pattern: re.Pattern[str]
    complete: bool = True
    """Whether a part is lost without the others. False for a scale, which weights of a wider type do without."""
    only: frozenset[str] = frozenset()
    """Architectures that have the rule; empty: all."""
    never: frozenset[str] = frozenset()
    """Architectures that load the parts one by one."""

    def applies(self, architectures: frozenset[str]) -> bool:
        """Tell whether this model, or one of unknown architecture, has the rule."""
        return (not self.only or bool(self.only & architectures)) and not self.never & architectures

    def group(self, name: str) -> str | None:
        """The name of the group that ``name`` belongs to."""
        found = self.pattern.search(name)
        return f"{name[: found.start('part')]}*{name[found.end('part') :]}" if found else None


_SARASHINA = frozenset({"Sarashina2VisionForCausalLM"})
# Their loaders demand of every call what no bucket but the whole model has.
_WHOLE_MODEL_AT_ONCE = frozenset(
    {
        "BailingMM2NativeForConditionalGeneration",
        "BailingMMNativeForConditionalGeneration",
        "BailingMoeV3VLForConditionalGeneration",
        "DeepseekOCRForCausalLM",
        "Dots3NoteForCausalLM",
        "Grok1ForCausalLM",
        "Grok1ModelForCausalLM",
        "IQuestQ1ForCausalLM",
        "InternS2MobiusForConditionalGeneration",
        "LagunaForCausalLM",
        "Step3p5ForCausalLM",
        "UnlimitedOCRForCausalLM",
        "WhisperForConditionalGeneration",
    }
)
_RULES = (
    _Rule(
        re.compile(r"\.(?P<part>q_a_proj|kv_a_proj_with_mqa)\."),
        never=frozenset(
            {
                "MiniCPM3ForCausalLM",
                "SarvamMLAForCausalLM",
                "KimiK3ForConditionalGeneration",
                "KimiK3LinearForCausalLM",
            }
        ),
    ),
    _Rule(re.compile(r"\.(?P<part>wq_a|wkv_a_with_mqa)\.")),
    _Rule(re.compile(r"\.(?P<part>wq_a|wkv)\.")),
    _Rule(re.compile(r"\.compressor\.(?P<part>wkv|wgate)\.")),
    _Rule(re.compile(r"\.wo_a\.(?P<part>weight|scale|weight_scale)$"), complete=False),
    _Rule(re.compile(r"\.indexer\.(wk|weights_proj)\.(?P<part>weight|weight_scale|weight_scale_inv)$"), complete=False),
    _Rule(
        re.compile(r"\.qkv_proj\.(?P<part>weight|weight_scale_inv)$"),
        complete=False,
        only=frozenset({"MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"}),
    ),
    _Rule(re.compile(r"\.self_attn\.(?P<part>[qkv]_proj)\.weight$"), only=_SARASHINA),
    _Rule(re.compile(r"\.mlp\.(?P<part>gate_proj|up_proj)\.weight$"), only=_SARASHINA),
    _Rule(
        re.compile(r"(^|\.)vision_tower\..*\.self_attn\.(?P<part>[qkv]_proj)\.(weight|bias)$"),
        only=frozenset({"MiniMaxM3SparseForConditionalGeneration"}),
    ),
    _Rule(re.compile(r"^(?P<part>.+)$"), only=_WHOLE_MODEL_AT_ONCE),
)


_Split = list[tuple[str, int | None]]
"""A group's tensors and their buckets; None: not sent."""


def _fused_groups(manifest: Manifest, reference: Reference | None, allow: Allowance) -> list[Finding]:
    architectures = reference.architectures if reference else frozenset[str]()
    places = {tensor.name: index for index, bucket in enumerate(manifest.buckets) for tensor in bucket.tensors}
    absent = _allowed_absences(places, reference, allow)
    splits = [split for rule in _RULES if rule.applies(architectures) for split in _splits(rule, places, absent)]
    if not splits:
        return []
    tensors = [name for split in splits for name, _ in split]
    groups = "1 group" if len(splits) == 1 else f"{len(splits)} groups"
    message = (
        f"{groups} of tensors that SGLang takes together or not at all ({len(tensors)} tensors), "
        f"the first {_where(splits[0])}: it would drop them without an error, or die; put each group into one bucket"
    )
    return [_finding(Severity.ERROR, FindingKind.FUSED_GROUP_SPLIT, tensors, message)]


def _allowed_absences(sent: Container[str], reference: Reference | None, allow: Allowance) -> list[str]:
    """Tensors that are left out on purpose; the others that are missing have a finding of their own."""
    if reference is None or not allow.missing:
        return []
    allowed = matcher(allow.missing)
    return [n for n in reference.tensors if n not in sent and not _may_miss(n, reference) and allowed(n)]


def _splits(rule: _Rule, places: Mapping[str, int], absent: Iterable[str]) -> Iterator[_Split]:
    groups: defaultdict[str, _Split] = defaultdict(list)
    for name, bucket in places.items():
        if (group := rule.group(name)) is not None:
            groups[group].append((name, bucket))
    for name in absent if rule.complete else ():
        group = rule.group(name)
        if group is not None and group in groups:
            groups[group].append((name, None))
    return (split for split in groups.values() if len({place for _, place in split}) > 1)


def _where(split: _Split) -> str:
    first: dict[int | None, str] = {}
    for name, place in split:
        first.setdefault(place, name)
    named = [f"{name!r} " + ("not sent" if at is None else f"in bucket {at}") for at, name in first.items()]
    return " and ".join(named[:2])


def _unchecked(sent: Container[str], reference: Reference | None) -> Iterator[str]:
    if reference is None:
        yield (
            "Names, missing tensors, shapes and dtypes were not checked: there is neither a readable checkpoint nor an "
            "earlier verified update to compare with."
        )
    elif reference.checkpoint is None:
        yield (
            f"What {reference.source} itself lacked, or had and the engine skipped, was not found: there is no "
            "readable checkpoint, so the manifest was compared with that update."
        )
    if reference is None or not reference.architectures:
        yield "Fused groups that only some architectures have were not checked: the model's architecture is not known."
    if reference is not None:
        yield from _draft(sent, reference)


def _draft(sent: Container[str], reference: Reference) -> Iterator[str]:
    draft = [name for name in reference.tensors if name not in sent and reference.is_of_draft(name)]
    if draft:
        yield (
            f"Whether the engine has a draft model was not checked: {_tensors(draft)} of draft layers in "
            f"{reference.source} but not in the manifest, the first {draft[0]!r}."
        )


def is_pattern(entry: str) -> bool:
    """Whether an allowance's entry stands for more than the name that it spells."""
    return any(sign in entry for sign in "*?[")


def matcher(allowed: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a name is one of an allowance's, or matches one of its patterns."""
    # What fnmatchcase does, but compiled once: its own cache is too small for a client's long list.
    exact = frozenset(allowed)
    patterns = [translate(entry) for entry in allowed if is_pattern(entry)]
    pattern = re.compile("|".join(patterns)) if patterns else None
    return lambda name: name in exact or (pattern is not None and pattern.match(name) is not None)


def _finding(severity: Severity, kind: FindingKind, tensors: list[str], message: str) -> Finding:
    return Finding(severity, kind, tuple(tensors[:MAX_TENSORS_LISTED]), message)


def _tensors(found: Sized) -> str:
    """Subject and verb."""
    return "1 tensor is" if len(found) == 1 else f"{len(found)} tensors are"
