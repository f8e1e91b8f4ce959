"""Whether this process and an engine can share memory, so that weights need no network.

Invariant: "yes" is said only if the engine's ranks can open what this process exports: the same /dev/shm, whose files
hold host memory and CUDA's reference counters, and for GPUs the same one for rank r here and rank r there.
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


def shares_memory(engine: pb.EngineInfo, rank: int, device: torch.device | None) -> bool:
    """Whether ``rank``'s memory on ``device`` can be opened by the engine's rank of the same number.

    An older sidecar, or one that cannot tell, is believed to be beside its trainer, as it always was.
    """
    theirs, mine = engine.shared_memory_id, shared_memory_id()
    if theirs and mine and theirs != mine:
        return False
    if engine.device != "cuda" or rank >= len(engine.gpu_uuids) or not engine.gpu_uuids[rank]:
        return True
    if not torch.cuda.is_available():
        return False
    return _uuid(device) == engine.gpu_uuids[rank].lower().removeprefix("gpu-")


def _uuid(device: torch.device | None) -> str:
    at = device.index if device is not None and device.type == "cuda" else None
    index = torch.cuda.current_device() if at is None else at
    return str(torch.cuda.get_device_properties(index).uuid).lower()
