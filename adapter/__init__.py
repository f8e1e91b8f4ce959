"""What a trainer imports: torch and gRPC, never SGLang.

from adapter import WeightSyncClient

client = WeightSyncClient("unix:/run/weight-sync/sidecar.sock", rank=rank, tp_size=tp_size)
client.update_weights(model.state_dict().items(), version=str(step))
"""

from adapter.client import WeightSyncClient
from adapter.errors import (
    EngineUnreachable,
    IncompatibleSidecar,
    LaunchError,
    MemoryNotExportable,
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
    "EngineUnreachable",
    "GenerateClient",
    "Generation",
    "IncompatibleSidecar",
    "LaunchError",
    "MemoryNeed",
    "MemoryNotExportable",
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
