"""Whether this process and an engine can share memory, so that weights need no network.

Invariant: "no" is said only where sharing surely fails: another /dev/shm, whose files hold host memory, or a GPU that
is none of the engine's.
"""

from functools import cache
from pathlib import Path

import torch

from sidecar.v1 import weight_sync_pb2 as pb

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def shared_memory_id() -> str:
    """Which /dev/shm this process sees, as the sidecar tells of its own; empty where it cannot be told."""
    try:
        return f"{BOOT_ID.read_text().strip()}:{SHM.stat().st_dev}"
    except OSError:
        return ""


def shares_memory(engine: pb.EngineInfo, device: torch.device | None) -> bool:
    """Whether this process's memory (on ``device``, by default the current GPU) can be opened by the engine's ranks.

    Each rank of a trainer answers for itself; one whose ranks may differ names the transport. On a GPU of the engine it
    is said to be so whatever else is in the way: then nothing but shared memory can work, and the sidecar says what is
    missing. So it is of an engine of several nodes, whose ranks elsewhere cannot be seen from the sidecar, and where
    nothing is known.
    """
    if engine.num_nodes > 1:
        return True
    uuids = [uuid.lower().removeprefix("gpu-") for uuid in engine.gpu_uuids if uuid]
    if engine.device == "cuda" and uuids:
        return torch.cuda.is_available() and _uuid(device) in uuids
    theirs, mine = engine.shared_memory_id, shared_memory_id()
    return not theirs or not mine or theirs == mine


def _uuid(device: torch.device | None) -> str:
    at = device.index if device is not None and device.type == "cuda" else None
    index = torch.cuda.current_device() if at is None else at
    return str(torch.cuda.get_device_properties(index).uuid).lower()
