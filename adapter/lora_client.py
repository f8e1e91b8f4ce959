"""A LoRA adapter on its way into a running engine: one rank's part, in one call from one piece of memory.

Invariant: whatever goes wrong on this rank, the others are told of it, and none is left waiting for this one. Memory
that was handed over is dropped only when the engine has let it go, never saw it or died with it; or, after a load into
an engine on the CPU, when this process alone holds on to it no more: there the adapter goes on to live in the very
memory that was sent (SGLang copies it only to move it off a GPU), so it becomes the engine's.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol, TypeAlias

import torch

from adapter import wire
from adapter.bucketed import ABORT_TIMEOUT_S, Buckets, in_words, take_part
from adapter.errors import IncompatibleSidecar, UpdateRefused, WeightSyncError
from adapter.exports import Export
from adapter.ledger import RELEASE_PATIENCE_S, ExportLedger
from adapter.outgoing import Planner
from adapter.sidecar_stub import SidecarStub
from adapter.sources.lazy import NamedTensors
from adapter.staging import StagingBuffers
from sidecar.v1 import weight_sync_pb2 as pb

ONE_BUCKET = 1 << 62
REFUSED_S = 1.0
_GONE_WITH_THE_ENGINE = ("ENGINE_RESTARTED", "ENGINE_UNREACHABLE")
_BEFORE_ANYTHING = ("UPDATE_IN_PROGRESS", "RANKS_DIFFER", "DRAINING")


class PeftConfig(Protocol):
    """peft's LoraConfig, and what looks like it."""

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json."""


LoraConfig: TypeAlias = Mapping[str, Any] | PeftConfig


class LoraSender:
    """Sends one rank's adapters, one after the other."""

    def __init__(self, stub: SidecarStub, ledger: ExportLedger) -> None:
        self._stub = stub
        self._ledger = ledger

    def load(
        self, request: pb.LoadLoraAdapterRequest, named_tensors: NamedTensors, device: torch.device, timeout_s: float
    ) -> tuple[str, ...]:
        """Send the adapter that ``request`` describes; the names that the engine has afterwards.

        Raises ``WeightSyncError`` or ``ValueError``.
        """
        cargo = Planner(ONE_BUCKET, ()).outgoing(named_tensors, None)
        buckets = cargo.staged(StagingBuffers(1), device)  # of its own: on the CPU the memory becomes the engine's
        export = self._filled(request, buckets)
        try:
            response = self._stub.call(self._stub.rpc.LoadLoraAdapter, request, timeout_s)
        except WeightSyncError as error:
            self._failed(export, request.update_id, error)
            raise
        except BaseException:
            self._keep(export, request.update_id, patience_s=0.0)
            raise
        self._loaded(export, request.update_id)
        return tuple(response.loaded_adapters)

    def _filled(self, request: pb.LoadLoraAdapterRequest, buckets: Buckets) -> Export:
        try:
            request.manifest.manifest.CopyFrom(wire.manifest(buckets.plan))
            export = buckets.fill(0)
            request.handle.CopyFrom(export.handle())
        except BaseException as error:
            self._tell_others(request, in_words(error))
            if isinstance(error, Exception):
                take_part(buckets.forgo)
            raise
        return export

    def _tell_others(self, request: pb.LoadLoraAdapterRequest, why: str) -> None:
        if request.tp_size == 1:
            return
        request.ClearField("manifest")
        request.give_up = why
        with suppress(WeightSyncError):  # nobody is there: the cause says why
            self._stub.call(self._stub.rpc.LoadLoraAdapter, request, ABORT_TIMEOUT_S)

    def _loaded(self, export: Export, update_id: str) -> None:
        if export.flat.is_cuda:
            self._keep(export, update_id)

    def _failed(self, export: Export, update_id: str, error: WeightSyncError) -> None:
        if _out_of_use(error):
            export.reclaim()
        elif error.reason == "ENGINE_REFUSED":  # nobody reads it later: it was let go by now, or never opened
            self._keep(export, update_id, patience_s=REFUSED_S)
            export.reclaim()
        else:
            self._keep(export, update_id, patience_s=0.0)

    def _keep(self, export: Export, update_id: str, patience_s: float = RELEASE_PATIENCE_S) -> None:
        """Until its count says that the engine has let go, or the engine is another one."""
        self._ledger.hold(export, update_id, 0)
        self._ledger.settle_one(export, patience_s)


def _out_of_use(error: WeightSyncError) -> bool:
    """Whether the engine was surely never given the memory, or has died with it."""
    if error.reason in _GONE_WITH_THE_ENGINE or error.details.get("numPosted") == "0":
        return True
    if "numPosted" in error.details:
        return False
    # Refused before a load began; or by gRPC itself.
    return isinstance(error, UpdateRefused | IncompatibleSidecar) or error.reason in _BEFORE_ANYTHING


def config_json(config: LoraConfig) -> str:
    """adapter_config.json as text; raises ``ValueError`` for what is neither a mapping nor has ``to_dict``."""
    content = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"config must be a dict or a peft LoraConfig, not {type(config).__name__}")
    return json.dumps(dict(content), default=_plain)


def _plain(value: object) -> object:
    """Sets and enums of peft's; of anything else the sidecar needs to know only that it is set."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return value.value if isinstance(value, Enum) else str(value)
