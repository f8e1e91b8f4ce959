"""Many engines, one version: ``Fleet(["host-1:50051", "host-2:50051"]).update_weights(named_tensors, version="7")``.

Runs in the trainer, with torch and gRPC alone. The bytes go over torch.distributed, once for all engines.
"""

from adapter.fleet.discovery import Asked, Discovery, Dns, Listed
from adapter.fleet.fleet import Fleet
from adapter.fleet.policy import ALL_OR_NOTHING, BEST_EFFORT, Policy, quorum
from adapter.fleet.result import EngineResult, EngineState, FleetResult, FleetUpdateFailed

__all__ = [
    "ALL_OR_NOTHING",
    "BEST_EFFORT",
    "Asked",
    "Discovery",
    "Dns",
    "EngineResult",
    "EngineState",
    "Fleet",
    "FleetResult",
    "FleetUpdateFailed",
    "Listed",
    "Policy",
    "quorum",
]
