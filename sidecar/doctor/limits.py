"""Whether there is room: files, shared memory, and one message for the model's manifest.

Invariant: what is made to try something out is gone again when the check ends.
"""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from sidecar import checkpoint
from sidecar.config import Limits
from sidecar.doctor.finding import Check, Finding, fail, ok, skipped, warn
from sidecar.doctor.host import Host
from sidecar.doctor.namespaces import SHM
from sidecar.doctor.situation import Situation

MIB = 1 << 20
BASE_FILES = 64
"""What a sidecar, or a trainer's rank with torch, has open anyway."""
FILES_PER_RANK = 8
ROOMY_FILES = 1024
CUDA_MIB_PER_RANK = 4
"""Torch's counters (80,064 bytes each), the driver's file (81,920), leases and verdicts, with room."""
CPU_MIB_PER_RANK = 64
BUFFERS_MIB_PER_RANK = 4096
"""Two staging buffers of the adapter's default size, which a smaller model does not fill."""
TENSOR_OVERHEAD_BYTES = 48
"""Of one tensor in a manifest, its name aside: dtype, shape, offset and size."""
MAX_MANIFEST_BYTES = Limits().message_bytes
LARGER_SHM = (
    "make it larger: docker run --shm-size, a pod's emptyDir with medium Memory and a sizeLimit, mount -o size="
)


def _ranks(situation: Situation) -> int:
    info = situation.engine.info
    return situation.options.ranks or (info.tp_size if info else 1)


def shm_space(situation: Situation) -> Iterable[Finding]:
    """Whether files can be made in /dev/shm, and whether what an update needs fits."""
    host = situation.host
    problem = _cannot_make_files(host.shm)
    if problem:
        reason = f"this user cannot make files in {SHM}: {problem}"
        return [fail(Check.SHM_SPACE, reason, "mount a tmpfs there that this user may write to (mode 1777)")]
    space = host.statvfs(host.shm)
    total, free = (blocks * space.f_frsize // MIB for blocks in (space.f_blocks, space.f_bavail))
    size = f"{SHM} has {free} of {total} MiB free"
    ranks, on_cuda = _ranks(situation), situation.engine.on_cuda
    needed = ranks * (CUDA_MIB_PER_RANK if on_cuda else CPU_MIB_PER_RANK)
    if free < needed:
        return [fail(Check.SHM_SPACE, f"{size}, and {ranks} ranks need {needed} MiB at least", LARGER_SHM)]
    if not on_cuda and free < ranks * BUFFERS_MIB_PER_RANK:
        reason = f"{size}; for a large model {ranks} ranks stage up to {ranks * BUFFERS_MIB_PER_RANK} MiB there"
        return [warn(Check.SHM_SPACE, reason, f"give the client a smaller bucket_bytes, or {LARGER_SHM}")]
    return [ok(Check.SHM_SPACE, size)]


def _cannot_make_files(folder: Path) -> str:
    file = folder / f"sglang-weight-sync-doctor-{secrets.token_hex(8)}"
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        file.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def open_files(situation: Situation) -> Iterable[Finding]:
    """Whether this process, and the engine's, may have enough files open."""
    host, pid = situation.host, situation.engine.pid
    limits = {"this process": host.open_files, "the engine's process": _limit_of(host, pid)}
    who, allowed = min(limits.items(), key=lambda limit: limit[1])
    needed = BASE_FILES + FILES_PER_RANK * _ranks(situation)
    fix = "raise it: ulimit -n 65536, docker run --ulimit nofile=65536:65536"
    if allowed < needed:
        return [fail(Check.OPEN_FILES, f"{who} may open {allowed} files, and {needed} are needed", fix)]
    if allowed < ROOMY_FILES:
        return [warn(Check.OPEN_FILES, f"{who} may open {allowed} files, which torch and gRPC may use up", fix)]
    return [ok(Check.OPEN_FILES, f"{who} may open {allowed} files")]


def _limit_of(host: Host, pid: str) -> int:
    """The soft limit of open files of a process; what this one has, if that is not seen."""
    lines = (host.text(pid, "limits") or "").splitlines() if pid else []
    values = [line.split()[3] for line in lines if line.startswith("Max open files")]
    return int(values[0]) if values and values[0].isdigit() else host.open_files


def manifest(situation: Situation) -> Iterable[Finding]:
    """Whether the names and shapes of the engine's model fit into one message, and are known here for comparison."""
    info = situation.engine.info
    if info is None:
        return [skipped(Check.MANIFEST, "the engine has not said what it is")]
    try:
        tensors = checkpoint.read(Path(info.model_path)).tensors
    except checkpoint.CheckpointUnreadable as error:
        why = f"the engine's checkpoint is not read here, so that the first update is compared with nothing: {error}"
        return [skipped(Check.MANIFEST, why)]
    size = sum(len(name.encode()) + TENSOR_OVERHEAD_BYTES for name in tensors)
    said = f"{len(tensors)} tensors make a manifest of about {size >> 10} KiB of {MAX_MANIFEST_BYTES // MIB} MiB"
    if size > MAX_MANIFEST_BYTES:
        return [fail(Check.MANIFEST, said, "send the model in several updates, each with the names that it has")]
    return [ok(Check.MANIFEST, said)]
