"""The coordinator's refusals in words: one function per sentence, so that the state machine reads as one.

Invariant: each names the update, and the ranks, bucket or phase that it is about, and says whether the engine was
touched.
"""

from sidecar.errors import (
    DeadlinePassed,
    Draining,
    EngineError,
    EngineLost,
    EngineRefused,
    EngineRestarted,
    EngineTimeout,
    InvalidRequest,
    NotKnown,
    RankAlreadyDelivered,
    Reason,
    SyncError,
    UnsuitableEngine,
    UpdateConflict,
    UpdateFailed,
)
from sidecar.header import MAX_TEXT, Header
from sidecar.update import Phase, Update

UNTOUCHED = "the engine was not touched and serves the old weights"
MAX_REASON = 500
"""Characters of a rank's own words: they are told to all ranks, logged, and kept."""
MAX_LISTED = 20


def unknown_update(update_id: str, kept: int) -> NotKnown:
    """No such id."""
    update_id = update_id[:MAX_TEXT]
    message = f"update {update_id!r} is not among the last {kept}; was the sidecar restarted since?"
    return NotKnown(Reason.UPDATE_UNKNOWN, message, updateId=update_id)


def not_begun(update_id: str, rank: int) -> InvalidRequest:
    """A push or commit without BeginUpdate."""
    message = f"rank {rank} has not begun update {update_id!r}; call BeginUpdate first"
    return InvalidRequest(Reason.RANK_OUT_OF_RANGE, message, rank=rank, updateId=update_id)


def no_such_bucket(update: Update, rank: int, bucket: int) -> InvalidRequest:
    """A bucket that the manifest does not have."""
    message = f"rank {rank}: bucket {bucket} is outside 0..{update.num_buckets - 1} of update {update.id!r}"
    return InvalidRequest(Reason.INVALID_HANDLE, message, rank=rank, bucket=bucket, updateId=update.id)


def unpushed_buckets(update: Update, rank: int, buckets: list[int]) -> InvalidRequest:
    """A commit that came too early."""
    which = f"{buckets[:MAX_LISTED]}" + (f" and {len(buckets) - MAX_LISTED} more" if len(buckets) > MAX_LISTED else "")
    message = f"rank {rank} commits update {update.id!r} without having pushed buckets {which}"
    return InvalidRequest(Reason.EMPTY_UPDATE, message, rank=rank, updateId=update.id)


def not_abortable(update: Update) -> UnsuitableEngine:
    """Nothing is missing any more."""
    message = f"update {update.id!r} is complete, so nothing stops it any more; ask for its outcome instead"
    return UnsuitableEngine(Reason.NOT_ABORTABLE, message, updateId=update.id)


def aborted_by(update: Update, rank: int, why: str) -> UpdateConflict:
    """A rank's own wish."""
    why = own_words(why)
    message = f"rank {rank} aborted update {update.id!r}: {why}"
    return UpdateConflict(Reason.UPDATE_ABORTED, message, rank=rank, updateId=update.id)


def caller_gone(update: Update, rank: int) -> UpdateConflict:
    """A rank's call ended before its memory was used."""
    what = "broadcast" if update.header.group_name else "memory"
    before = f"the engine had its {what}"
    if update.phase is Phase.DECIDE:
        before = "it had said that the version is to be published"
    message = f"update {update.id!r}: rank {rank} cancelled its call, or died, before {before}"
    if update.num_posted == 0:
        message += f"; {UNTOUCHED}"
    return UpdateConflict(Reason.UPDATE_ABORTED, message, updateId=update.id, rank=rank)


def restarted_meanwhile(update_id: str) -> EngineRestarted:
    """Another server answers than the one that the first rank was checked against."""
    message = f"update {update_id!r}: the engine was restarted while ranks arrived; send the update again"
    return EngineRestarted(Reason.ENGINE_RESTARTED, message, updateId=update_id)


def draining() -> Draining:
    """The sidecar is on its way out."""
    return Draining(Reason.DRAINING, f"the sidecar is stopping and takes no new update; try its successor; {UNTOUCHED}")


def unsupported_engine(url: str, why: str) -> UnsuitableEngine:
    """A server whose update protocol is unknown, or that was started without what an update needs."""
    message = f"the engine at {url} cannot be updated: {why}"
    return UnsuitableEngine(Reason.ENGINE_UNSUPPORTED, message, engineUrl=url)


def in_progress(current: Update, header: Header) -> UpdateConflict:
    """Another update is in hand."""
    message = f"rank {header.rank} sends update {header.update_id!r}, but update {current.id!r} is "
    message += f"{current.state.name.lower()} and waits for ranks [{_listed(current.missing())}]; every rank must send "
    message += "the same"
    return UpdateConflict(
        Reason.UPDATE_IN_PROGRESS, message, rank=header.rank, updateId=header.update_id, current=current.id
    )


def busy(wanted: str, with_what: str) -> UpdateConflict:
    """One thing at a time: an update, or a LoRA adapter."""
    message = f"{wanted} cannot begin, because {with_what} is in hand; wait for its end and send again; {UNTOUCHED}"
    return UpdateConflict(Reason.UPDATE_IN_PROGRESS, message, current=with_what)


def lora_not_served(url: str) -> UnsuitableEngine:
    """A server without LoRA."""
    message = f"the engine at {url} serves no LoRA adapters; start it with --enable-lora, --max-lora-rank and "
    message += "--lora-target-modules, or send merged weights"
    return UnsuitableEngine(Reason.ENGINE_UNSUPPORTED, message, engineUrl=url)


def lora_one_rank_only(version: str, tp_size: int) -> UnsuitableEngine:
    """One handle, which every TP rank would open and let go of."""
    message = (
        f"SGLang {version} hands one LoRA adapter's memory to all of its {tp_size} TP ranks, and the first to let "
    )
    message += "go would take it from the rest; use 0.5.17 or later, or tp_size 1, or send merged weights"
    return UnsuitableEngine(Reason.ENGINE_UNSUPPORTED, message, version=version, tpSize=tp_size)


def lora_name_taken(name: str, loaded: tuple[str, ...]) -> InvalidRequest:
    """A name that SGLang would not load a second time."""
    message = f"an adapter {name!r} is loaded already (of {', '.join(loaded)}); say replace, or choose another name"
    return InvalidRequest(Reason.INVALID_ADAPTER, message, loraName=name)


def adapters_differ(load: Update, rank: int) -> UpdateConflict:
    """Two ranks with two configs."""
    message = f"{load.id!r}: ranks {load.header.rank} and {rank} differ in the adapter's config, or in pinned or "
    message += "replace; every rank must send the same; the engine was not touched"
    return UpdateConflict(Reason.RANKS_DIFFER, message, updateId=load.id, ranks=f"{load.header.rank},{rank}")


def lora_load_broke(load: Update, error: EngineError, loaded: tuple[str, ...] | None, *, unloaded: bool) -> EngineError:
    """A load that came to nothing, and what requests can name now."""
    name = load.header.weight_version
    message = f"LoRA adapter {name!r} was not loaded ({error.message})"
    if loaded is None:
        message += "; whether requests can name it is unknown"
    elif name in loaded:
        message += f"; the engine lists {name!r} all the same"
    elif unloaded:
        message += "; the one that it was to replace is unloaded, so requests cannot name it"
    if isinstance(error, EngineLost) or (loaded and name in loaded):
        message += "; unload it and load it again"
    return type(error)(error.reason, message, **error.details)


def lora_unwanted(load: Update, why: SyncError) -> UpdateConflict:
    """Given up between the old adapter's unload and the new one's load."""
    message = f"{why.message.removesuffix(f'; {UNTOUCHED}')}; the adapter that it was to replace is unloaded already, "
    message += f"so requests cannot name {load.header.weight_version!r} until it is loaded again"
    return UpdateConflict(Reason.UPDATE_ABORTED, message, updateId=load.id)


def lora_in_use(name: str, late: EngineTimeout, seconds: float) -> EngineTimeout:
    """An unload that waits for requests."""
    message = (
        f"requests that use LoRA adapter {name!r} still ran after {seconds:.1f} s; the engine unloads it when they "
    )
    message += "end, and takes no new ones for that name; try again, or wait longer (--pause-timeout)"
    return EngineTimeout(Reason.ENGINE_TIMEOUT, message, **late.details)


def still_unloading(name: str) -> DeadlinePassed:
    """A caller's deadline that does not stop an unload."""
    message = f"LoRA adapter {name!r} is still being unloaded: the engine waits for the requests that use it; ask again"
    return DeadlinePassed(Reason.STILL_APPLYING, message, loraName=name)


def died_of(lost: EngineLost) -> EngineRestarted:
    """A call that was lost with its server."""
    return EngineRestarted(Reason.ENGINE_RESTARTED, f"{lost.message}; it has died since", **lost.details)


def id_reused(update: Update, rank: int) -> RankAlreadyDelivered:
    """An id that belongs to an update that has ended."""
    message = f"update id {update.id!r} has ended ({update.state.name.lower()}) and these weights, from rank {rank}, "
    message += "were not loaded; choose a new update id (and version)"
    return RankAlreadyDelivered(Reason.UPDATE_ID_REUSED, message, updateId=update.id, rank=rank)


def missing(update: Update, ranks: list[int], what: str, seconds: float) -> DeadlinePassed:
    """A wait for ranks that ended."""
    names = _listed(ranks)
    message = f"update {update.id!r}: waited {seconds:.1f} s for rank{'s' if len(ranks) > 1 else ''} {names} {what}"
    if update.num_posted == 0:
        message += f"; {UNTOUCHED}"
    return DeadlinePassed(Reason.RANKS_MISSING, message, updateId=update.id, ranks=names)


def still_applying(update: Update) -> DeadlinePassed:
    """A caller's deadline that does not stop the update."""
    message = f"update {update.id!r} is still being applied (phase {update.phase.name.lower()}, bucket "
    message += f"{update.num_loaded} of {update.num_buckets}); it goes on: ask for its outcome with GetUpdate"
    return DeadlinePassed(Reason.STILL_APPLYING, message, updateId=update.id, phase=update.phase.name)


def still_going_on(update: Update) -> DeadlinePassed:
    """The deadline of a call that only shows that its rank lives."""
    message = f"update {update.id!r} is still {update.state.name.lower()}; hold it again"
    return DeadlinePassed(Reason.STILL_APPLYING, message, updateId=update.id, phase=update.phase.name)


def over_a_group(update_id: str, rank: int, call: str) -> InvalidRequest:
    """A call for memory, in an update whose bytes are broadcast, or one that is in two phases in a call for one."""
    update_id = update_id[:MAX_TEXT]
    message = f"rank {rank}: {call} does not suit update {update_id!r}, which comes over a group or in two phases; "
    message += "call BeginUpdate, PrepareUpdate, CommitUpdate and, in two phases, PublishUpdate"
    return InvalidRequest(Reason.INVALID_HEADER, message, rank=rank, updateId=update_id)


def not_prepared(update: Update, rank: int) -> InvalidRequest:
    """A commit over a group at which the engine does not wait yet."""
    message = (
        f"rank {rank} commits update {update.id!r} before the engine was made ready; call PrepareUpdate first, and "
    )
    message += "broadcast when it has returned"
    return InvalidRequest(Reason.NOT_PREPARED, message, rank=rank, updateId=update.id)


def not_ready_to_publish(update: Update, rank: int) -> InvalidRequest:
    """PublishUpdate out of turn."""
    message = f"rank {rank} publishes update {update.id!r}, which is not ready for that (phase "
    message += f"{update.phase.name.lower()}); begin it with two_phase, and wait for the answer to CommitUpdate"
    return InvalidRequest(Reason.NOT_PREPARED, message, rank=rank, updateId=update.id)


def cannot_wait_unpaused(header: Header) -> UnsuitableEngine:
    """Weights that are waited for, or that wait for their version, while generation goes on."""
    message = f"rank {header.rank}: an update over a group or in two phases waits for its trainer with the engine made "
    message += "ready, which needs a pause; choose another pause mode than none"
    return UnsuitableEngine(Reason.PAUSE_MODE_UNSUITABLE, message, rank=header.rank, updateId=header.update_id)


def group_lost(update: Update, error: SyncError) -> EngineLost:
    """A bucket that is received by nobody knows which ranks."""
    message = f"update {update.id!r}: whether every rank has received bucket {update.num_loaded} cannot be told "
    message += f"({error.message})"
    return EngineLost(Reason.ENGINE_LOST, message, updateId=update.id, bucket=update.num_loaded)


def phase_deadline(update: Update, phase: Phase, error: SyncError) -> DeadlinePassed:
    """The engine did not answer in time, before anything was touched."""
    message = f"update {update.id!r}: phase {phase.name.lower()} waited for the engine, not for a rank "
    message += f"({error.message}); {UNTOUCHED}"
    return DeadlinePassed(
        Reason.ENGINE_TIMEOUT, message, updateId=update.id, phase=phase.name, bucket=update.num_loaded
    )


def nobody_waits(update: Update) -> DeadlinePassed:
    """The last caller's deadline, before anything was touched."""
    message = f"update {update.id!r}: the deadline of the last caller passed before phase {update.phase.name.lower()}; "
    return DeadlinePassed(Reason.ENGINE_TIMEOUT, message + UNTOUCHED, updateId=update.id, phase=update.phase.name)


def failed(update: Update, phase: Phase, error: SyncError) -> UpdateFailed:
    """The engine is dirty now: phase, bucket and ranks say how far it got."""
    where = f"in phase {phase.name.lower()}"
    if phase is Phase.LOAD and update.num_buckets:
        where += f" at bucket {update.num_loaded} of {update.num_buckets}"
    ranks = error.details.get("ranks") or error.details.get("rank") or f"0-{update.header.tp_size - 1}"
    message = f"update {update.id!r}, ranks {ranks}, broke off {where} after the engine was touched: {error.message}; "
    message += "generation stays paused until a complete update is loaded, or a checkpoint from disk"
    details = {**error.details, "updateId": update.id, "phase": phase.name, "bucket": update.num_loaded}
    details |= {"ranks": ranks, "numPosted": update.num_posted, "cause": error.reason}
    return UpdateFailed(Reason.UPDATE_FAILED, message, **details)


def left_unfinished(update_id: str) -> UpdateFailed:
    """What a predecessor of this process has left."""
    message = f"a sidecar before this one ended while it applied update {update_id!r}; generation stays paused until a "
    message += "complete update is loaded"
    return UpdateFailed(Reason.UPDATE_FAILED, message, updateId=update_id)


def cannot_go_unpaused(header: Header, version: str, num_buckets: int) -> UnsuitableEngine:
    """A pause mode that would let requests meet half of an update."""
    what = f"{num_buckets} buckets" if num_buckets else "a load from disk"
    message = f"rank {header.rank}: pause mode none takes one bucket, which carries its version, on SGLang {version}; "
    message += f"this is {what}; choose another pause mode"
    return UnsuitableEngine(Reason.PAUSE_MODE_UNSUITABLE, message, rank=header.rank, updateId=header.update_id)


def cannot_verify_unpaused(header: Header) -> UnsuitableEngine:
    """A version that is served together with its bucket can only be verified too late."""
    message = (
        f"rank {header.rank}: without a pause the version is served as soon as its bucket is loaded, so it cannot "
    )
    message += "be verified before; choose another pause mode, or leave verify out"
    return UnsuitableEngine(Reason.PAUSE_MODE_UNSUITABLE, message, rank=header.rank, updateId=header.update_id)


def cannot_keep_cache(header: Header) -> UnsuitableEngine:
    """A pause mode that finds out by a flush whether requests are running."""
    message = f"rank {header.rank}: pause mode {header.pause_mode.value} sees by a flush that the engine is idle, so "
    message += "the prefix cache cannot be kept; choose retract, in_place or abort, or leave keep_cache out"
    return UnsuitableEngine(Reason.PAUSE_MODE_UNSUITABLE, message, rank=header.rank, updateId=header.update_id)


def another_gpu(sent_from: str, expected: str, rank: int, where: str) -> UnsuitableEngine:
    """Memory of a GPU that is not the engine rank's."""
    message = (
        f"{where}: the memory is on GPU-{sent_from}, but the engine's TP rank {rank} runs on GPU-{expected}; send "
    )
    message += f"rank {rank}'s weights from that GPU, or name the engine's with serve --gpu-uuids if that is wrong"
    return UnsuitableEngine(
        Reason.GPU_MISMATCH, message, rank=rank, gpu=f"GPU-{sent_from}", engineGpu=f"GPU-{expected}"
    )


def selector_unsuitable(header: Header, why: str) -> UnsuitableEngine:
    """Models that this engine does not have, or cannot tell apart."""
    selector = header.selector.value if header.selector else "unspecified"
    message = f"rank {header.rank}: selector {selector} does not suit this engine: {why}"
    return UnsuitableEngine(Reason.SELECTOR_UNSUITABLE, message, rank=header.rank, selector=selector)


def manifest_mismatch(header: Header, problems: list[str], sources: tuple[str, ...]) -> InvalidRequest:
    """Tensors that the model does not have, or lacks."""
    message = f"rank {header.rank}: the manifest does not fit the model ({', '.join(sources) or 'no source'}): "
    message += f"{'; '.join(problems)}; allow by name what is meant so; {UNTOUCHED}"
    return InvalidRequest(Reason.MANIFEST_MISMATCH, message, rank=header.rank, updateId=header.update_id)


def not_loaded(update: Update, bucket: int, rank: int, why: str) -> EngineRefused:
    """What the replay loader says, or does not."""
    message = (
        f"update {update.id!r}: the engine's rank {rank} has not loaded bucket {bucket} by its replay loader: {why}"
    )
    return EngineRefused(Reason.ENGINE_REFUSED, message, updateId=update.id, rank=rank, bucket=bucket)


def kept_memory_unusable(header: Header) -> UnsuitableEngine:
    """Memory that the engine has mapped from before can be named to the replay loader alone."""
    message = (
        f"rank {header.rank}: update {header.update_id!r} names memory that the engine keeps mapped, but this update "
        f"does not go through its replay loader any more; hand the memory over anew, by sending again; {UNTOUCHED}"
    )
    return UnsuitableEngine(Reason.MEMORY_IS_KEPT, message, rank=header.rank, updateId=header.update_id)


def version_not_new(header: Header, served: str) -> InvalidRequest:
    """A version that was served before, or that would go backwards."""
    message = f"rank {header.rank}: weight_version {header.weight_version!r} does not come after {served!r}, which the "
    message += "engine has served; versions are unique, and increase where they are decimal numbers"
    return InvalidRequest(
        Reason.VERSION_NOT_NEW, message, rank=header.rank, version=header.weight_version, served=served
    )


def defect(update: Update, bug: Exception) -> UpdateFailed:
    """Our own mistake, without its text."""
    message = f"update {update.id!r} broke off by a defect in the sidecar ({type(bug).__name__}); see its log"
    return UpdateFailed(Reason.UPDATE_FAILED, message, updateId=update.id, numPosted=update.num_posted)


def own_words(text: str) -> str:
    """A caller's own words, so that they stay one sentence among others."""
    words = " ".join(text[: 2 * MAX_REASON].split())[:MAX_REASON] or "no reason given"
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in words)


def _listed(numbers: list[int]) -> str:
    """Ranks or buckets, of which there may be thousands."""
    shown = ", ".join(map(str, numbers[:MAX_LISTED]))
    return f"{shown} and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else shown
