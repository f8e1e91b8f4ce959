"""What a trainer imports: torch and gRPC, never SGLang.

from adapter import WeightSyncClient

client = WeightSyncClient("unix:/run/weight-sync/sidecar.sock", rank=rank, tp_size=tp_size)
client.update_weights(model.state_dict().items(), version=str(step))
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapter.client import WeightSyncClient
    from adapter.credentials import Credentials
    from adapter.errors import (
        EngineUnreachable,
        IncompatibleSidecar,
        LaunchError,
        MemoryNotExportable,
        NotAllowed,
        RanksMissing,
        SidecarUnreachable,
        UpdateAborted,
        UpdateFailed,
        UpdateRefused,
        UpdateStillApplying,
        WeightSyncError,
    )
    from adapter.exportable import allocate_flat
    from adapter.generate import GenerateClient, Generation
    from adapter.outgoing import MemoryNeed
    from adapter.planner import TensorSpec
    from adapter.verl_engine import VerlEngine
    from adapter.wire import UpdateResult

__all__ = [
    "Credentials",
    "EngineUnreachable",
    "GenerateClient",
    "Generation",
    "IncompatibleSidecar",
    "LaunchError",
    "MemoryNeed",
    "MemoryNotExportable",
    "NotAllowed",
    "RanksMissing",
    "SidecarUnreachable",
    "TensorSpec",
    "UpdateAborted",
    "UpdateFailed",
    "UpdateRefused",
    "UpdateResult",
    "UpdateStillApplying",
    "VerlEngine",
    "WeightSyncClient",
    "WeightSyncError",
    "allocate_flat",
]

_HOMES = {
    "Credentials": "adapter.credentials",
    "EngineUnreachable": "adapter.errors",
    "GenerateClient": "adapter.generate",
    "Generation": "adapter.generate",
    "IncompatibleSidecar": "adapter.errors",
    "LaunchError": "adapter.errors",
    "MemoryNeed": "adapter.outgoing",
    "MemoryNotExportable": "adapter.errors",
    "NotAllowed": "adapter.errors",
    "RanksMissing": "adapter.errors",
    "SidecarUnreachable": "adapter.errors",
    "TensorSpec": "adapter.planner",
    "UpdateAborted": "adapter.errors",
    "UpdateFailed": "adapter.errors",
    "UpdateRefused": "adapter.errors",
    "UpdateResult": "adapter.wire",
    "UpdateStillApplying": "adapter.errors",
    "VerlEngine": "adapter.verl_engine",
    "WeightSyncClient": "adapter.client",
    "WeightSyncError": "adapter.errors",
    "allocate_flat": "adapter.exportable",
}


def __getattr__(name: str) -> object:
    """Import what is asked for: SGLang's schedulers import ``adapter.loader``, and have no gRPC to offer."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
