"""Messages that the sidecar would take, for one kind of engine: what the mutations start from."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from google.protobuf.message import Message

from sidecar import convert
from sidecar.manifest import ITEM_SIZES
from sidecar.v1 import weight_sync_pb2 as pb

METHODS: dict[str, type[Message]] = {
    "GetCapabilities": pb.GetCapabilitiesRequest,
    "GetStatus": pb.GetStatusRequest,
    "UpdateWeights": pb.UpdateWeightsRequest,
    "BeginUpdate": pb.BeginUpdateRequest,
    "HoldUpdate": pb.HoldUpdateRequest,
    "PushBucket": pb.PushBucketRequest,
    "PrepareUpdate": pb.PrepareUpdateRequest,
    "CommitUpdate": pb.CommitUpdateRequest,
    "PublishUpdate": pb.PublishUpdateRequest,
    "AbortUpdate": pb.AbortUpdateRequest,
    "UpdateWeightsFromDisk": pb.UpdateWeightsFromDiskRequest,
    "CheckManifest": pb.CheckManifestRequest,
    "LoadLoraAdapter": pb.LoadLoraAdapterRequest,
    "UnloadLoraAdapter": pb.UnloadLoraAdapterRequest,
    "GetUpdate": pb.GetUpdateRequest,
    "InitWeightsUpdateGroup": pb.InitWeightsUpdateGroupRequest,
    "DestroyWeightsUpdateGroup": pb.DestroyWeightsUpdateGroupRequest,
    "FenceEngine": pb.FenceEngineRequest,
}
BUCKET_BYTES = 4096
ALIGNMENT = 64
SHAPES = ((), (0,), (1,), (3, 4), (2, 3, 5), (64,), (1, 1, 1, 7), (0, 5))
MODULES = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DTYPES = {name.removeprefix("DATA_TYPE_").lower(): number for name, number in pb.DataType.items() if number}
CHECKPOINT_TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
CHECKPOINT_SHAPE = (4, 8)

HOSTILE_JSON: tuple[Callable[[], Any], ...] = (
    lambda: "\ud800",
    lambda: ["q_proj", "\udfff"],
    lambda: [["q_proj"]],
    lambda: float("1e308"),
    lambda: 10**400,
    lambda: -1,
    lambda: True,
    lambda: {"a": {"b": []}},
    lambda: "x" * 3000,
    lambda: "a\nb\x00",
    lambda: ["漢" * 400] * 3,
    lambda: None,
    lambda: 2**63,
    lambda: ["*"] * 2000,
)
CONFIG_KEYS = ("r", "lora_alpha", "target_modules", "peft_type", "bias", "use_dora", "use_rslora", "rank_pattern")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a trainer knows of the engine that it sends to."""

    tp_size: int
    memory: Callable[[int, int], pb.MemoryHandle]
    """A handle of a rank's, of a place; any place."""
    has_checkpoint: bool = False
    """Whether the sidecar can read what the model's tensors are."""
    folder: str = ""
    """One that the engine can load from disk."""
    store_port: int = 29500
    """Where something of the trainer's listens on this host."""


class Valid:
    """Draws from one generator of random numbers. ``prefix`` keeps the ids of one block apart from others'."""

    def __init__(self, rng: random.Random, facts: Facts, prefix: str) -> None:
        self.facts = facts
        self._rng = rng
        self._prefix = prefix
        self._count = 0
        self._digests = ["0" * 64]

    def new_id(self) -> str:
        """An id that was not used yet, or, now and then, one of a few."""
        self._count += 1
        return f"again {self._rng.randrange(4)}" if self._rng.random() < 0.1 else f"{self._prefix}.{self._count}"

    def message(self, method: str) -> Message:
        """One that could be part of a real exchange."""
        update_id, rank = self.new_id(), self._rng.randrange(self.facts.tp_size)
        match method:
            case "UpdateWeights":
                return self.one_call(update_id, self.manifest(self._num_buckets()), self._options())(rank)
            case "BeginUpdate":
                return self.begin(update_id, self.manifest(self._num_buckets()), self._options())(rank)
            case "PushBucket":
                return pb.PushBucketRequest(update_id=update_id, rank=rank, bucket=0, handle=self.handle(rank, 0))
            case "AbortUpdate":
                return pb.AbortUpdateRequest(
                    update_id=update_id, rank=rank, reason="a test's", even_if_not_begun=self._rng.random() < 0.5
                )
            case "HoldUpdate" | "PrepareUpdate" | "CommitUpdate" | "PublishUpdate":
                return METHODS[method](update_id=update_id, rank=rank)
            case "UpdateWeightsFromDisk":
                return self.disk(update_id)
            case "CheckManifest":
                return pb.CheckManifestRequest(manifest=self.reference(self.manifest(self._num_buckets())))
            case "LoadLoraAdapter":
                return self.adapter(update_id, f"adapter {self._rng.randrange(3)}")(rank)
            case "UnloadLoraAdapter":
                return pb.UnloadLoraAdapterRequest(lora_name=f"adapter {self._rng.randrange(3)}")
            case "GetUpdate":
                return pb.GetUpdateRequest(update_id=update_id)
            case "InitWeightsUpdateGroup":
                return self.join(self.group_name())
            case "DestroyWeightsUpdateGroup":
                return pb.DestroyWeightsUpdateGroupRequest(group_name=self.group_name())
            case "FenceEngine":
                return pb.FenceEngineRequest(reason="a test's", pause=self._rng.random() < 0.5)
            case _:
                return METHODS[method]()

    # Whole updates, rank by rank.

    def one_call(
        self, update_id: str, manifest: pb.Manifest, options: dict[str, Any]
    ) -> Callable[[int], pb.UpdateWeightsRequest]:
        """What each rank sends of one update."""
        reference = self.reference(manifest)
        return lambda rank: pb.UpdateWeightsRequest(
            update=self.header(update_id, rank, options),
            manifest=reference,
            handles=[self.handle(rank, place) for place in range(len(manifest.buckets))],
        )

    def begin(
        self, update_id: str, manifest: pb.Manifest, options: dict[str, Any]
    ) -> Callable[[int], pb.BeginUpdateRequest]:
        """How each rank opens one update."""
        reference = self.reference(manifest)
        return lambda rank: pb.BeginUpdateRequest(update=self.header(update_id, rank, options), manifest=reference)

    def disk(self, update_id: str) -> pb.UpdateWeightsFromDiskRequest:
        """A checkpoint's load; half the time one that exists."""
        return pb.UpdateWeightsFromDiskRequest(
            update_id=update_id,
            weight_version=f"disk {update_id}",
            model_path=self._rng.choice((self.facts.folder, "", "/nowhere")),
        )

    def adapter(self, update_id: str, name: str) -> Callable[[int], pb.LoadLoraAdapterRequest]:
        """What each rank sends of one LoRA adapter; half the time with a config that is odd."""
        r, manifest = self._rng.choice((1, 4, 8)), pb.Manifest()
        modules = [module for module in ("q_proj", "v_proj") for _ in range(1)]
        config: dict[str, Any] = {"peft_type": "LORA", "r": r, "lora_alpha": 16, "target_modules": modules}
        self._fill(manifest.buckets.add(), [(n, "float32", s) for n, s in _factors(modules, r)])
        if self._rng.random() < 0.3:
            config[self._rng.choice(CONFIG_KEYS)] = self._rng.choice(HOSTILE_JSON)()
        reference, replace = self.reference(manifest), self._rng.random() < 0.8
        return lambda rank: pb.LoadLoraAdapterRequest(
            update_id=update_id,
            rank=rank,
            tp_size=self.facts.tp_size,
            lora_name=name,
            config_json=json.dumps(config),
            replace=replace,
            manifest=reference,
            handle=self.handle(rank, 0),
        )

    # Groups.

    def group_name(self) -> str:
        """A new one, or, half the time, one of a few."""
        return f"group {self._rng.randrange(4)}" if self._rng.random() < 0.5 else f"group of {self.new_id()}"

    def join(self, name: str) -> pb.InitWeightsUpdateGroupRequest:
        """Of the engine's ranks and a trainer; now and then over GPUs, which half of the engines have."""
        group = pb.WeightsUpdateGroup(
            group_name=name,
            master_address="127.0.0.1",
            master_port=self.facts.store_port,
            rank_offset=1,
            world_size=1 + self.facts.tp_size,
            backend=self._rng.choice(("gloo", "gloo", "nccl")),
        )
        return pb.InitWeightsUpdateGroupRequest(group=group)

    def dense_manifest(self, num_buckets: int) -> pb.Manifest:
        """Whose tensors lie as a group carries them: one after the other, the largest elements first."""
        manifest = pb.Manifest()
        for number in range(num_buckets):
            drawn = [self._tensor(f"model.layers.{number}.{place}") for place in range(self._rng.randint(1, 5))]
            drawn.append((f"model.layers.{number}.last.weight", "float32", (3, 4)))
            drawn.sort(key=lambda tensor: -ITEM_SIZES[tensor[1]])
            self._fill(manifest.buckets.add(), drawn, alignment=1)
        return manifest

    # Parts.

    def header(self, update_id: str, rank: int, options: dict[str, Any]) -> pb.UpdateHeader:
        """A header with the options that all ranks share."""
        version = f"version of {update_id}"
        return pb.UpdateHeader(
            update_id=update_id, weight_version=version, rank=rank, tp_size=self.facts.tp_size, **options
        )

    def _options(self) -> dict[str, Any]:
        rng, options = self._rng, dict[str, Any]()
        if rng.random() < 0.3:
            options["pause_mode"] = rng.choice(pb.PauseMode.values())
        if rng.random() < 0.1:
            options["verify"] = True
            options["content_digest"] = rng.choice(("", "content"))
        if rng.random() < 0.1:
            options["selector"] = rng.choice(pb.Selector.values())
        if rng.random() < 0.1:
            options["keep_cache"] = True
        if rng.random() < 0.1:
            options["two_phase"] = True
        options["allow"] = pb.ManifestAllowance(unknown=["*"], missing=["model.*"] if rng.random() < 0.9 else [])
        return options

    def options(self) -> dict[str, Any]:
        """What an update may ask for beside its weights."""
        return self._options()

    def manifest(self, num_buckets: int) -> pb.Manifest:
        """One that any engine could take; of the checkpoint's own tensors where there is one, half the time."""
        manifest = pb.Manifest()
        if self.facts.has_checkpoint and self._rng.random() < 0.5:
            self._fill(manifest.buckets.add(), [(name, "float32", CHECKPOINT_SHAPE) for name in CHECKPOINT_TENSORS])
        for number in range(num_buckets - len(manifest.buckets)):
            drawn = [self._tensor(f"model.layers.{number}.{place}") for place in range(self._rng.randint(1, 5))]
            self._fill(manifest.buckets.add(), drawn)
        return manifest

    def reference(self, manifest: pb.Manifest) -> pb.ManifestReference:
        """In full, or by a digest that was sent before."""
        if self._rng.random() < 0.1:
            return pb.ManifestReference(digest=self._rng.choice(self._digests))
        self._digests = [*self._digests[-9:], convert.manifest(manifest).digest()]
        return pb.ManifestReference(manifest=manifest)

    def handle(self, rank: int, place: int) -> pb.MemoryHandle:
        """Memory of that rank."""
        return self.facts.memory(rank, place)

    def _num_buckets(self) -> int:
        return self._rng.choice((1, 1, 1, 2, 3))

    def _tensor(self, name: str) -> tuple[str, str, tuple[int, ...]]:
        return f"{name}.weight", self._rng.choice(list(ITEM_SIZES)), self._rng.choice(SHAPES)

    @staticmethod
    def _fill(
        bucket: pb.BucketSpec, tensors: list[tuple[str, str, tuple[int, ...]]], alignment: int = ALIGNMENT
    ) -> None:
        offset = 0
        for name, dtype, shape in tensors:
            size = prod(shape) * ITEM_SIZES[dtype]
            bucket.tensors.add(
                name=name,
                dtype=pb.DataType.ValueType(_DTYPES[dtype]),
                shape=shape,
                byte_offset=offset,
                size_bytes=size,
            )
            offset = -(-(offset + size) // alignment) * alignment
        bucket.size_bytes = max(offset, alignment)


def _factors(modules: list[str], r: int) -> list[tuple[str, tuple[int, int]]]:
    base = "base_model.model.model.layers.0.self_attn"
    pairs = [(module, factor) for module in modules for factor in "AB"]
    return [(f"{base}.{module}.lora_{factor}.weight", (r, 8) if factor == "A" else (8, r)) for module, factor in pairs]
