"""Whether the trainer sees the GPUs that the engine's ranks run on, as its rank r must send from that of rank r.

Read from the driver's files, as ``sidecar.engine.gpus`` does. Invariant: a GPU that is not known is no fault.
"""

import os
from collections.abc import Iterable
from dataclasses import replace

from sidecar.doctor.finding import Check, Finding, fail, ok, skipped, warn
from sidecar.doctor.situation import Situation
from sidecar.engine import gpus
from sidecar.engine.info import EngineInfo

NAME_THEM = "name the engine's GPUs with --gpu-uuids, one per TP rank as `nvidia-smi -L` shows them, also for `serve`"


def visible(situation: Situation) -> Iterable[Finding]:
    """Compare the engine's GPUs with those that this process sees."""
    host, told = situation.host, situation.engine.info
    if told is None or told.device != "cuda":
        reason = "the engine has not said what it is" if told is None else f"the engine is on {told.device}"
        return [skipped(Check.GPUS, reason)]
    info = gpus.seen(replace(told, unsupported=""), situation.options.gpu_uuids, host.root)
    if info.unsupported:
        return [fail(Check.GPUS, *_split(info.unsupported))]
    strangers = [uuid for uuid in _here(info) if uuid and info.host_gpus and uuid not in info.host_gpus]
    if strangers:
        return [fail(Check.GPUS, f"GPU-{strangers[0]} is not one of this host's GPUs", NAME_THEM)]
    if not any(info.gpu_uuids):
        return [warn(Check.GPUS, "which GPUs the engine's ranks run on is not seen, so a wrong one is not", NAME_THEM)]
    return [_compared(info, _ours(situation))]


def _split(problem: str) -> tuple[str, str]:
    reason, _, fix = problem.partition("; ")
    return reason, fix


def _here(info: EngineInfo) -> tuple[str, ...]:
    """By TP rank: the GPUs of those ranks that are on this host."""
    return info.gpu_uuids[: info.placement.num_here]


def _compared(info: EngineInfo, ours: set[str] | None) -> Finding:
    if ours is None:
        reason = "which GPUs this process sees is not known: the driver does not show them all, or CUDA's order is not"
        return warn(Check.GPUS, reason, "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or look with `nvidia-smi -L`")
    known = {rank: uuid for rank, uuid in enumerate(_here(info)) if uuid}
    hidden = {rank: uuid for rank, uuid in known.items() if uuid not in ours}
    if not hidden:
        return ok(Check.GPUS, f"this process sees the GPUs of {len(known)} of the engine's {info.tp_size} ranks")
    named = ", ".join(f"rank {rank} on GPU-{uuid}" for rank, uuid in hidden.items())
    fix = "let trainer rank r have the GPU of the engine's rank r (CUDA_VISIBLE_DEVICES, docker run --gpus)"
    if len(hidden) == len(known):
        return fail(Check.GPUS, f"this process sees none of the engine's GPUs: {named}", fix)
    return warn(Check.GPUS, f"this process does not see the GPUs of {named}, so that it cannot be that rank", fix)


def _ours(situation: Situation) -> set[str] | None:
    """The GPUs that this process sees; None if that is not known."""
    host = situation.host
    shown = [gpu for gpu in gpus.shown(host.root) if os.access(host.at(f"/dev/nvidia{gpu.minor}"), os.F_OK)]
    entries, order = host.environ.get("CUDA_VISIBLE_DEVICES"), host.environ.get("CUDA_DEVICE_ORDER", "")
    found = set(gpus.visible(entries, order, shown))
    by_the_bus = order == "PCI_BUS_ID" or len({gpu.model for gpu in shown}) == 1
    return found if found or (shown and by_the_bus) else None
