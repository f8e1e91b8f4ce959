"""What an SGLang server says about itself, and what follows from its release.

Pure. Invariant: an ``EngineInfo`` without ``unsupported`` is a server whose update protocol the sidecar knows.
Source of the rules: SGLang's released wheels 0.5.15.post1 to 0.5.23 (docs/engine.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import InvalidVersion, Version

from sidecar.memory import Placement
from sidecar.payload import REPLAY_FORMAT

OLDEST_SUPPORTED = Version("0.5.15.post1")
NEWEST_KNOWN = Version("0.5.23")
"""A later release may have changed its routes: it is asked which it has (``missing_routes``)."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one range of SGLang releases needs around an update."""

    name: str
    """Its first release."""
    uses_sessions: bool
    """begin_weight_update .. end_weight_update around loading."""
    has_selector: bool
    """Bodies name the model runners (target, draft) by ``selector``."""


SHOWS_READY_SINCE = Version("0.5.20")
"""GET /ready: whether requests are taken (srt/entrypoints/http_server.py)."""


LORA_BY_RANK_SINCE = Version("0.5.17")
"""/load_lora_adapter_from_tensors takes one payload per TP rank; before, one for all (srt/managers/io_struct.py)."""

NEEDED_ROUTES = (
    "/pause_generation",
    "/update_weights_from_tensor",
    "/flush_cache",
    "/update_weight_version",
    "/continue_generation",
    "/update_weights_from_distributed",  # the session probe
)
SESSION_ROUTES = ("/begin_weight_update", "/end_weight_update")

# Newest first: a release follows the first whose name it is not older than.
DIALECTS = (
    Dialect("0.5.21", uses_sessions=True, has_selector=True),
    Dialect("0.5.15.post1", uses_sessions=False, has_selector=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """One SGLang server, as ``/server_info`` described it."""

    version: str
    tp_size: int
    device: str
    """"cuda" or "cpu"."""
    dialect: Dialect
    nnodes: int = 1
    """Hosts that its TP ranks are spread over, as many on each; this sidecar's is the first."""
    seed: str = ""
    """random_seed: new at every start of the server, unless it was set."""
    shows_ready: bool = False
    """Whether GET /ready tells if requests are taken."""
    speculative: bool = False
    """Whether it has a draft model, so that an update must say which model it is for."""
    serves_lora: bool = False
    """Whether it was started with --enable-lora (or with --lora-paths)."""
    lora_by_rank: bool = True
    """Whether each of its TP ranks is given a LoRA adapter of its own to open."""
    model_path: str = field(default="", compare=False)
    """What it was started with, as far as it was seen before a load from disk."""
    process: str = field(default="", compare=False)
    """The process that listens at its port, as ``listener`` names it; empty where that cannot be seen."""
    ordinals: tuple[int, ...] = ()
    """By TP rank of the first node: the number that its GPU has in CUDA; empty where that cannot be told."""
    gpu_uuids: tuple[str, ...] = field(default=(), compare=False)
    """By TP rank, as far as they are known: see ``gpus``."""
    host_gpus: frozenset[str] = field(default=frozenset(), compare=False)
    """UUIDs of this host's GPUs, where they are known."""
    ep_size: int = 1
    """Ranks that its experts are spread over."""
    has_replay_loader: bool = False
    """Whether it was started with ``--custom-weight-loader adapter.loader.load``."""
    moves_experts: bool = False
    """Whether it moves experts between places while it runs (EPLB, elastic expert parallelism)."""
    is_unknown: bool = False
    """Whether its release is newer than any that this sidecar was made for."""
    unsupported: str = ""
    """Why it cannot be updated at all; empty if it can."""

    @property
    def placement(self) -> Placement:
        """What memory its ranks can open: SGLang fills one node after the other."""
        return Placement(
            device=self.device,
            num_here=ranks_per_node(self.tp_size, self.nnodes),
            gpu_uuids=self.gpu_uuids,
            host_gpus=self.host_gpus,
        )

    @property
    def replays(self) -> bool:
        """Whether buckets can go through the replay loader.

        Its answers are read on this host; one model loads; and experts stay where they were recorded.
        """
        return self.has_replay_loader and self.nnodes == 1 and not self.speculative and not self.moves_experts


def parse(server_info: Mapping[str, Any]) -> EngineInfo:
    """From the JSON of ``/server_info``. Never keeps it: it holds the server's API keys in clear."""
    version = str(server_info.get("version", ""))
    dialect, unsupported = _dialect(version)
    return EngineInfo(
        version=version,
        tp_size=_number(server_info, "tp_size"),
        device=str(server_info.get("device") or "cuda"),
        dialect=dialect,
        nnodes=_number(server_info, "nnodes"),
        ordinals=_ordinals(server_info),
        seed=str(server_info.get("random_seed", "")),
        shows_ready=_is_since(version, SHOWS_READY_SINCE),
        speculative=bool(server_info.get("speculative_algorithm")),
        serves_lora=bool(server_info.get("enable_lora")),
        lora_by_rank=_is_since(version, LORA_BY_RANK_SINCE),
        model_path=str(server_info.get("model_path") or ""),
        ep_size=_number(server_info, "ep_size"),
        moves_experts=bool(server_info.get("enable_eplb") or server_info.get("elastic_ep_backend")),
        has_replay_loader=REPLAY_FORMAT in (server_info.get("custom_weight_loader") or ()),
        is_unknown=_is_newer(version),
        unsupported=unsupported or _unsupported_layout(server_info, dialect),
    )


def missing_routes(info: EngineInfo, description: Mapping[str, Any]) -> list[str]:
    """Of ``/openapi.json``: which routes an update needs and this server does not have."""
    there = description.get("paths") or {}
    return [path for path in NEEDED_ROUTES + info.dialect.uses_sessions * SESSION_ROUTES if path not in there]


def ranks_per_node(tp_size: int, nnodes: int) -> int:
    """TP ranks on each host: rank r is on node r // this (SGLang, entrypoints/engine.py, without pipeline stages)."""
    return max(1, tp_size // max(1, nnodes))


def _ordinals(server_info: Mapping[str, Any]) -> tuple[int, ...]:
    """By TP rank of the first node: its GPU, in the numbers that CUDA gives to the GPUs that the server sees."""
    first, step = server_info.get("base_gpu_id"), server_info.get("gpu_id_step")
    if not isinstance(first, int) or not isinstance(step, int) or server_info.get("use_ray"):
        return ()
    places = range(ranks_per_node(_number(server_info, "tp_size"), _number(server_info, "nnodes")))
    return tuple(first + place * step for place in places)


def _dialect(version: str) -> tuple[Dialect, str]:
    """The rules for a release, and why it is too old or unreadable if it is."""
    try:
        release = Version(version)
    except InvalidVersion:
        return DIALECTS[0], f"it calls itself SGLang {version[:64]!r}, which is no version"
    # A pre-release or a build from source follows the rules of the release that it leads to.
    release = Version(release.base_version) if release.is_prerelease else release
    for dialect in DIALECTS:
        if release >= Version(dialect.name):
            return dialect, ""
    return DIALECTS[-1], f"SGLang {version} is older than {OLDEST_SUPPORTED}; upgrade the engine"


def _is_since(version: str, first: Version) -> bool:
    try:
        return Version(version) >= first
    except InvalidVersion:
        return False


def _is_newer(version: str) -> bool:
    """Than any that is known here; a local build of one that is known ("0.5.23+cpu") is not."""
    try:
        return Version(Version(version).public) > NEWEST_KNOWN
    except InvalidVersion:
        return False


def _unsupported_layout(server_info: Mapping[str, Any], dialect: Dialect) -> str:
    """What this server was started with that makes a tensor update impossible, if anything."""
    if _number(server_info, "pp_size") > 1:
        return (
            "pipeline parallelism (pp_size > 1): every stage would open the same memory handle; start it with tp_size "
            "or ep_size instead, or use SGLang's own /update_weights_from_disk"
        )
    if _number(server_info, "dp_size") > 1 and not server_info.get("enable_dp_attention"):
        return "data-parallel replicas (dp_size > 1): give each replica its own server and sidecar instead"
    if server_info.get("quantization") not in (None, "", "unquant"):
        return f"quantization {server_info['quantization']!r}: SGLang rebuilds such weights in place and may die of it"
    if server_info.get("speculative_algorithm") and not dialect.has_selector:
        return "speculative decoding before SGLang 0.5.21: the target's tensors would be loaded into the draft as well"
    if server_info.get("weight_cache_mode") not in (None, "off"):
        return "--weight-cache-mode is on: SGLang dies on an update; start it with off"
    if server_info.get("frontend") not in (None, "python"):
        return f"frontend {server_info['frontend']!r} has no weight-update routes; start it without SGLANG_RUST_SERVER"
    return ""


def _number(server_info: Mapping[str, Any], name: str) -> int:
    value = server_info.get(name)
    return value if isinstance(value, int) else 1
