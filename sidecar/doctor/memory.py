"""Whether the memory that torch allocates here can be opened by the engine.

Invariant: only settings are read; no GPU is touched. What is staged has plain handles whatever
``expandable_segments`` says (``adapter.exportable``), so that setting alone never fails.

Facts borrowed: torch reads PYTORCH_ALLOC_CONF, and PYTORCH_CUDA_ALLOC_CONF before it had that name; the backend
cudaMallocAsync has neither exports nor imports (c10/cuda, CUDAMallocAsyncAllocator.cpp); an expandable segment is
opened by pidfd_getfd, which needs one PID namespace and the right to trace the exporter (ptrace(2), Yama).
"""

from collections.abc import Iterable, Iterator, Mapping

from sidecar.doctor.finding import Check, Finding, fail, ok, skipped, warn
from sidecar.doctor.host import Host
from sidecar.doctor.namespaces import shares_pids
from sidecar.doctor.situation import Situation

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
CAP_SYS_PTRACE = 1 << 19
NO_ATTACH = 3
"""kernel.yama.ptrace_scope: nobody traces anybody."""
ON_CPU = "the engine is on the CPU"
PLAIN = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False in the trainer"


def allocator(situation: Situation) -> Iterable[Finding]:
    """How torch will allocate in the trainer, if it gets this environment."""
    if not situation.engine.on_cuda:
        return [skipped(Check.ALLOCATOR, ON_CPU)]
    settings = _settings(situation.host.environ)
    if settings.get("backend") == "cudaMallocAsync":
        reason = "torch is set to backend:cudaMallocAsync here, whose memory cannot be exported"
        return [fail(Check.ALLOCATOR, reason, "leave backend out of PYTORCH_CUDA_ALLOC_CONF in the trainer")]
    if settings.get("expandable_segments") != "True":
        return [ok(Check.ALLOCATOR, "torch allocates plain memory here, which CUDA IPC exports")]
    obstacles = " and ".join(_obstacles(situation.host, situation.engine.pid))
    if obstacles:
        reason = f"torch is set to expandable_segments here, and the engine may not open such memory ({obstacles}): "
        return [warn(Check.ALLOCATOR, reason + "staged updates go round it, updates in place do not", PLAIN)]
    reason = "torch is set to expandable_segments here: updates in place need allow_expandable_segments=True"
    return [ok(Check.ALLOCATOR, reason)]


def _settings(environ: Mapping[str, str]) -> Mapping[str, str]:
    parts = [part.partition(":") for name in reversed(VARIABLES) for part in environ.get(name, "").split(",")]
    return {key.strip(): value.strip() for key, _, value in parts}


def _obstacles(host: Host, pid: str) -> Iterator[str]:
    """What keeps the engine from fetching a descriptor out of this process."""
    if shares_pids(host, pid) is False:
        yield "it is in another PID namespace"
    scope = int((host.text("sys/kernel/yama/ptrace_scope") or "0").strip() or 0)
    if scope and (scope >= NO_ATTACH or not _may_trace(host, pid)):
        yield f"kernel.yama.ptrace_scope is {scope}"


def _may_trace(host: Host, pid: str) -> bool:
    capabilities = host.status(pid, "CapEff") if pid else []
    return bool(capabilities) and bool(int(capabilities[0], 16) & CAP_SYS_PTRACE)


def engine_allocator(situation: Situation) -> Iterable[Finding]:
    """How torch allocates in the engine, where its environment can be read."""
    if not situation.engine.on_cuda:
        return [skipped(Check.ENGINE_ALLOCATOR, ON_CPU)]
    pid = situation.engine.pid
    environ = situation.host.environ_of(pid) if pid else None
    if environ is None:
        return [skipped(Check.ENGINE_ALLOCATOR, "the environment of the engine's process is not seen")]
    if _settings(environ).get("backend") == "cudaMallocAsync":
        reason = "torch is set to backend:cudaMallocAsync in the engine, which cannot open exported memory"
        return [fail(Check.ENGINE_ALLOCATOR, reason, "leave backend out of the engine's PYTORCH_CUDA_ALLOC_CONF")]
    return [ok(Check.ENGINE_ALLOCATOR, "nothing in the engine's environment keeps it from opening exported memory")]
