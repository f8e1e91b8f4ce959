"""What is checked before an update may begin, of a rank's memory before it counts as delivered, and of its commit.

Invariant: nothing that fails here reaches the engine, because a wrong handle kills its scheduler.
"""

from collections.abc import Mapping

from sidecar import memory as memories
from sidecar import refusals
from sidecar.engine.info import EngineInfo
from sidecar.errors import InvalidRequest, Reason, UnsuitableEngine
from sidecar.header import Header, PauseMode, Selector
from sidecar.manifest import Manifest
from sidecar.manifest_check import Report
from sidecar.memory import CudaIpcMemory, Memory, Placement
from sidecar.update import Delivery, Update


def check_suits_engine(header: Header, info: EngineInfo, num_buckets: int) -> None:
    """This release can do what the update asks for; 0 buckets: it comes from disk."""
    unpaused = header.pause_mode is PauseMode.NONE and not info.dialect.uses_sessions
    if unpaused and num_buckets != 1:
        raise refusals.cannot_go_unpaused(header, info.version, num_buckets)
    if unpaused and header.verify:
        raise refusals.cannot_verify_unpaused(header)
    if (header.two_phase or header.group_name) and header.pause_mode is PauseMode.NONE:
        raise refusals.cannot_wait_unpaused(header)
    if header.keep_cache and not unpaused and header.pause_mode in (PauseMode.DRAIN, PauseMode.NONE):
        raise refusals.cannot_keep_cache(header)
    if header.selector in (Selector.TARGET, Selector.DRAFT) and not info.dialect.has_selector:
        raise refusals.selector_unsuitable(header, f"SGLang {info.version} cannot choose between models; leave it out")
    if header.selector is Selector.DRAFT and not info.speculative:
        raise refusals.selector_unsuitable(header, "the engine has no draft model")
    if header.selector is None and info.speculative and num_buckets:
        raise refusals.selector_unsuitable(header, "the engine has a draft model; say target, draft or all")


def check_version(header: Header, served: str, *, committed: bool, dirty: bool) -> None:
    """Versions are unique in an engine's life, and increase where they are decimal numbers.

    ``committed``: it was served in this life. ``dirty``: the engine holds weights of no one version, or is out of
    service: the version that it carries may be sent again, to heal it.
    """
    new = header.weight_version
    backwards = new.isdecimal() and served.isdecimal() and int(new) <= int(served)
    again = dirty and new == served
    if not again and (committed or new == served or backwards):
        raise refusals.version_not_new(header, served)


def check_report(report: Report, header: Header) -> None:
    """Nothing that was found in the manifest forbids the update."""
    if report.errors:
        raise refusals.manifest_mismatch(header, [finding.message for finding in report.errors], report.sources)


def check_repeated(update: Update, rank: int, handles: Mapping[int, Memory], epoch: int) -> None:
    """Only the very call that was made before gets its answer again: other memory means other weights."""
    before = update.deliveries.get(rank)
    other = before is None or any(before.handles.get(bucket) != memory for bucket, memory in handles.items())
    if other or update.epoch != epoch:
        raise refusals.id_reused(update, rank)


def check_commit(update: Update, rank: int) -> None:
    """It comes in its turn: after all buckets, or where they are broadcast, once the engine waits for them."""
    if update.header.group_name:
        if not update.receiving:
            raise refusals.not_prepared(update, rank)
        return
    unpushed = [bucket for bucket in range(update.num_buckets) if rank in update.waiting_for(bucket)]
    if unpushed:
        raise refusals.unpushed_buckets(update, rank, unpushed)


def check_every_bucket_has_memory(handles: Mapping[int, Memory], manifest: Manifest, rank: int) -> None:
    """A one-call update brings exactly one handle per bucket."""
    if len(handles) != len(manifest.buckets):
        message = f"rank {rank}: {len(handles)} memory handles for {len(manifest.buckets)} buckets; send one per bucket"
        raise InvalidRequest(Reason.INVALID_HANDLE, message, rank=rank)


def check_handles(handles: Mapping[int, Memory], manifest: Manifest, rank: int, placement: Placement) -> None:
    """Every handle is well formed, large enough, and something that the engine's rank can open where it runs."""
    for bucket, memory in handles.items():
        where = f"rank {rank}, bucket {bucket}"
        _check_kind(memory, placement.device, where)
        memories.check(memory, manifest.buckets[bucket].size_bytes, where, here=placement.is_here(rank))
        if isinstance(memory, CudaIpcMemory):
            _check_gpu(memory.device_uuid, rank, placement, where)


def check_own_memory(handles: Mapping[int, Memory], rank: int, others: Mapping[int, Delivery]) -> None:
    """No two ranks send from one GPU, or from one file: each engine TP rank reads, and lets go of, its own."""
    mine = {_owned(memory) for memory in handles.values()}
    for other, delivery in others.items():
        shared = mine & {_owned(memory) for memory in delivery.handles.values()}
        if other != rank and shared:
            name = min(shared)
            message = (
                f"ranks {other} and {rank} both send from {name}; rank r must send from memory of its own, on the "
            )
            message += "GPU of the engine's TP rank r"
            raise InvalidRequest(Reason.INVALID_HANDLE, message, ranks=f"{other},{rank}", memory=name)


def _owned(memory: Memory) -> str:
    """What belongs to one rank alone."""
    return f"GPU {memory.device_uuid}" if isinstance(memory, CudaIpcMemory) else f"shared memory {memory.name}"


def _check_kind(memory: Memory, device: str, where: str) -> None:
    """A CUDA handle is fatal to a server on the CPU; host memory is not what a GPU's loaders expect."""
    kind, needed = ("CUDA IPC", "cuda") if isinstance(memory, CudaIpcMemory) else ("host shared memory", "cpu")
    if device != needed:
        message = f"{where}: {kind} cannot be loaded by an engine on {device}; send memory of that device"
        raise UnsuitableEngine(Reason.MEMORY_KIND_MISMATCH, message, where=where, device=device)


def _check_gpu(sent_from: str, rank: int, placement: Placement, where: str) -> None:
    """The engine dies of memory on a GPU that it does not see, and copies across from one that is not its rank's."""
    expected = placement.gpu_of(rank)
    if expected and sent_from != expected:
        raise refusals.another_gpu(sent_from, expected, rank, where)
    if not expected and placement.is_here(rank) and placement.host_gpus and sent_from not in placement.host_gpus:
        message = f"{where}: GPU {sent_from!r} is not on this host; it has {', '.join(sorted(placement.host_gpus))}"
        raise InvalidRequest(Reason.INVALID_HANDLE, message, where=where)
