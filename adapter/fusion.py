"""Tensors that SGLang fuses within one load call, and so must travel in one bucket. Pure.

Some models collect tensors in a dict of that call until a group is complete, and drop what is left of it without a
word, or die. Read in SGLang 0.5.15.post1, 0.5.20 and 0.5.23, srt/models; the sidecar's ``manifest_check`` names the
files, and refuses a manifest that splits a group. Invariant: a group never depends on anything but names, so every
rank forms the same ones.
"""

import re
from collections.abc import Iterable, Sequence

FUSED_GROUPS: tuple[str, ...] = (
    # MLA: loaded as one matrix (DeepSeek V2 and all that inherit its loader).
    r"\.(?P<part>q_a_proj|kv_a_proj_with_mqa)\.",
    r"\.(?P<part>wq_a|wkv_a_with_mqa)\.",
    r"\.(?P<part>wq_a|wkv)\.",
    r"\.compressor\.(?P<part>wkv|wgate)\.",
    # A weight and its scales, where the loader needs both at once.
    r"\.wo_a\.(?P<part>weight|scale|weight_scale)$",
    r"\.indexer\.(wk|weights_proj)\.(?P<part>weight|weight_scale|weight_scale_inv)$",
    r"\.qkv_proj\.(?P<part>weight|weight_scale_inv)$",
    # A shared expert that is fused into the routed ones is loaded as one of them.
    r"\.shared_experts?\.(?P<part>gate_proj|up_proj)\.",
    r"(^|\.)vision_tower\..*\.self_attn\.(?P<part>[qkv]_proj)\.(weight|bias)$",
)
"""Names that differ only in what ``part`` matches make one group. Those of single architectures that would bind much
memory in all others are left to the sidecar's check, and to ``fused_groups`` of the client."""


def compile_rules(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    """Rules from regular expressions with a group ``part``; raises ``ValueError`` for one without."""
    rules = tuple(re.compile(pattern) for pattern in patterns)
    for rule in rules:
        if "part" not in rule.groupindex:
            raise ValueError(f"the fused group {rule.pattern!r} has no (?P<part>...): nothing says what differs in it")
    return rules


DEFAULT_RULES = compile_rules(FUSED_GROUPS)


def group_names(names: Sequence[str], rules: Sequence[re.Pattern[str]] = DEFAULT_RULES) -> list[list[int]]:
    """Positions of ``names``, together where a rule binds them; groups stand where their first member stood."""
    leader = list(range(len(names)))
    first_with: dict[str, int] = {}
    for position, name in enumerate(names):
        for key in _keys(name, rules):
            _join(leader, first_with.setdefault(key, position), position)
    groups: dict[int, list[int]] = {}
    for position in range(len(names)):
        groups.setdefault(_find(leader, position), []).append(position)
    return list(groups.values())


def _keys(name: str, rules: Sequence[re.Pattern[str]]) -> Iterable[str]:
    """What ``name`` is called without the part that differs, by each rule that knows it."""
    for number, rule in enumerate(rules):
        if found := rule.search(name):
            yield f"{number} {name[: found.start('part')]}*{name[found.end('part') :]}"


def _find(leader: list[int], position: int) -> int:
    while leader[position] != position:
        position = leader[position]
    return position


def _join(leader: list[int], one: int, other: int) -> None:
    first, second = sorted((_find(leader, one), _find(leader, other)))
    leader[second] = first
