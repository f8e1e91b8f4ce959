"""What a LoRA adapter must be for SGLang to serve it: its config and its tensors, checked before anything is posted.

Pure. SGLang refuses some of what is wrong when it loads an adapter, and dies of the rest only when the first request
names it (0.5.15.post1 to 0.5.23, srt/lora/lora.py and mem_pool.py: a factor without its partner, k or v without q, up
without gate, a shape that does not fit, a module that is not served). Invariant: what passes here is plain LoRA of
linear layers, [r, in] and [out, r], whose every module is named in ``target_modules``; so SGLang's own comparison of
those with its --lora-target-modules holds for every tensor.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.checkpoint import KnownTensor
from sidecar.errors import InvalidRequest, Reason
from sidecar.manifest import Manifest, TensorSpec

MAX_NAME = 128
MAX_CONFIG_BYTES = 64 << 10
MAX_RANK = 1 << 16
MAX_ALPHA = 1e9
MAX_SHOWN = 256
"""Characters of a caller's value in a message."""
DTYPES = ("float64", "float32", "float16", "bfloat16")

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLACE = re.compile(r"(^|\.)(layers\.\d+\..+|lm_head)$")
"""Where SGLang looks for a module: in a layer by its number, or the head. It skips any other in silence."""
_EXPERT = re.compile(r"\.experts\.\d+\.")

# What SGLang does not know of (0.5.23, srt/lora/lora_config.py) and would leave out: the answers would be others.
_NEVER_SET = (
    "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip

# Loaded as one by SGLang; each comes only with those on its right.
_NEEDS = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
    "kv_a_proj_with_mqa": ("q_a_proj",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One adapter without its tensors, the same on every rank."""

    name: str
    """What requests call it."""
    r: int
    alpha: float
    """The scaling is alpha / r."""
    target_modules: tuple[str, ...]
    pinned: bool
    replace: bool
    """Whether an adapter of that name goes first."""

    def engine_config(self) -> dict[str, object]:
        """All that SGLang reads of an adapter_config.json."""
        modules = list(self.target_modules)
        return {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "target_modules": modules}


def parse(config_json: str, *, name: str, pinned: bool, replace: bool, rank: int) -> AdapterSpec:
    """What a rank says of its adapter; raises ``InvalidRequest`` for what SGLang cannot serve, or would serve wrong."""
    check_name(name, f"rank {rank}")
    config = _object(config_json, rank)
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise _invalid(rank, f"peft_type is {_shown(config.get('peft_type'))}; SGLang serves LORA only")
    for key in _NEVER_SET:
        if config.get(key):
            raise _invalid(rank, f"{key} is set, which SGLang does not know; leave it out, or send merged weights")
    if config.get("bias") not in (None, "none"):
        raise _invalid(rank, f"bias is {_shown(config['bias'])}; SGLang serves adapters without biases only")
    r, alpha = _rank_and_alpha(config, rank)
    modules = _modules(config.get("target_modules"), rank)
    return AdapterSpec(name=name, r=r, alpha=alpha, target_modules=modules, pinned=pinned, replace=replace)


def check_name(name: str, who: str) -> None:
    """An adapter's name; raises ``InvalidRequest``."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        message = f"{who}: lora_name must be 1 to {MAX_NAME} printable characters, not {name[:MAX_NAME]!r}"
        raise InvalidRequest(Reason.INVALID_ADAPTER, message, field="lora_name")


def check_tensors(spec: AdapterSpec, manifest: Manifest, rank: int) -> None:
    """The tensors are an adapter's of that config; raises ``InvalidRequest`` naming the one that is not."""
    if len(manifest.buckets) != 1:
        raise _invalid(rank, f"an adapter is one bucket, not {len(manifest.buckets)}")
    listed = {module.rpartition(".")[2] for module in spec.target_modules}
    modules = _modules_of(manifest, rank)
    for module, factors in modules.items():
        _check_module(module, listed, rank)
        _check_factors(module, factors, spec.r, rank)
        _check_fusion(module, modules, rank)


def check_model(manifest: Manifest, known: Mapping[str, KnownTensor], rank: int) -> list[str]:
    """The adapter's shapes fit the model's; what could not be told, in sentences. Raises ``InvalidRequest``."""
    shapes = _shapes(known)
    unknown = []
    for module, factors in _modules_of(manifest, rank).items():
        there, sent = shapes.get(_place(module), set()), (factors["B"].shape[0], factors["A"].shape[1])
        if not there and _EXPERT.search(module):
            raise _invalid(rank, f"{module}: the engine's checkpoint has no such expert")
        if not there:
            unknown.append(module)
        elif not there & {sent, sent[::-1]}:
            base = " or ".join(str(list(shape)) for shape in sorted(there))
            raise _invalid(rank, f"{module}: the adapter is for {list(sent)}, but the model's weight is {base}")
    return (
        [f"shapes not checked, since the checkpoint has no weight of {', '.join(unknown)[:MAX_SHOWN]}"]
        if unknown
        else []
    )


def _object(text: str, rank: int) -> dict[str, Any]:
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise _invalid(rank, f"config_json is longer than {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(rank, f"config_json is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise _invalid(rank, "config_json is not a JSON object; send PEFT's adapter_config.json")
    return config


def _rank_and_alpha(config: Mapping[str, Any], rank: int) -> tuple[int, float]:
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise _invalid(rank, f"r must be a whole number of at least 1, not {_shown(r)}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= MAX_ALPHA:
        raise _invalid(rank, f"lora_alpha must be a number, not {_shown(alpha)}")
    # SGLang always scales by alpha / r; rank-stabilised LoRA by alpha / sqrt(r).
    return r, alpha * math.sqrt(r) if config.get("use_rslora") else alpha


def _modules(listed: object, rank: int) -> tuple[str, ...]:
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) and name for name in listed):
        problem = f"target_modules must be a list of module names, not {_shown(listed)}"
        raise _invalid(rank, f"{problem}; a peft model's own config lists them once the adapter is made")
    if odd := [name for name in listed if len(name) > MAX_NAME or not name.isprintable()]:
        problem = f"a module name must be 1 to {MAX_NAME} printable characters, not {odd[0][:MAX_NAME]!r}"
        raise _invalid(rank, f"target_modules: {problem}")
    return tuple(sorted(set(listed)))


def _modules_of(manifest: Manifest, rank: int) -> dict[str, dict[str, TensorSpec]]:
    """By module: its factors A and B."""
    modules: dict[str, dict[str, TensorSpec]] = {}
    for tensor in manifest.tensors():
        found = _FACTOR.fullmatch(tensor.name)
        if found is None:
            problem = f"tensor {tensor.name!r} is no factor of a linear layer (.lora_A.weight or .lora_B.weight)"
            raise _invalid(rank, f"{problem}; SGLang would take it for one, or skip it")
        modules.setdefault(found["module"], {})[found["factor"]] = tensor
    return modules


def _check_module(module: str, listed: set[str], rank: int) -> None:
    if not _place(module):
        raise _invalid(rank, f"module {module} is in no layer (layers.N.), so SGLang would skip it")
    leaf = module.rpartition(".")[2]
    if leaf not in listed:
        raise _invalid(rank, f"module {module} is not among target_modules ({', '.join(sorted(listed))[:MAX_SHOWN]})")


def _check_factors(module: str, factors: Mapping[str, TensorSpec], r: int, rank: int) -> None:
    for factor, other in ("AB", "BA"):
        if factor not in factors:
            raise _invalid(rank, f"{module} has lora_{other} without lora_{factor}; send both")
    for factor, axis in (("A", 0), ("B", 1)):
        tensor = factors[factor]
        if len(tensor.shape) != 2 or tensor.shape[axis] != r or 0 in tensor.shape:
            wanted = f"[{r}, in]" if factor == "A" else f"[out, {r}]"
            raise _invalid(rank, f"{tensor.name} is {list(tensor.shape)}, but must be {wanted} by the config's r")
        if tensor.dtype not in DTYPES:
            raise _invalid(rank, f"{tensor.name} is {tensor.dtype}; SGLang's LoRA takes {', '.join(DTYPES)}")


def _check_fusion(module: str, modules: Mapping[str, object], rank: int) -> None:
    parent, _, leaf = module.rpartition(".")
    missing = [needed for needed in _NEEDS.get(leaf, ()) if f"{parent}.{needed}" not in modules]
    if missing:
        raise _invalid(rank, f"{module} comes without {' and '.join(missing)}, which SGLang fuses it with; adapt both")


def _shapes(known: Mapping[str, KnownTensor]) -> dict[str, set[tuple[int, ...]]]:
    """The model's weights by their places; a vision tower may have layers of the same numbers."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in known.items():
        if name.endswith(".weight") and (place := _place(name.removesuffix(".weight"))):
            shapes.setdefault(place, set()).add(tensor.shape)
    return shapes


def _place(module: str) -> str:
    found = _PLACE.search(module)
    return found[2] if found else ""


def _shown(value: object) -> str:
    """On one line, and without what UTF-8 cannot carry, which JSON can."""
    return repr(value)[:MAX_SHOWN]


def _invalid(rank: int, problem: str) -> InvalidRequest:
    message = f"rank {rank}: this LoRA adapter cannot be served: {problem}"
    return InvalidRequest(Reason.INVALID_ADAPTER, message, rank=rank)
