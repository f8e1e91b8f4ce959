"""Whether an SGLang server is there, takes the keys given, and is one that can be updated.

Invariant: the engine is left as it was. What it says of itself holds its keys in clear, so only named facts are kept.
Whether a control route takes a key is asked by a call that lacks a required field: SGLang looks at the key first and
at the body next, and refuses that before anything is done (srt/utils/auth.py, entrypoints/http_server.py and
managers/io_struct.py, 0.5.15.post1 to 0.5.23).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from sidecar.doctor import wire
from sidecar.doctor.finding import Check, Finding, fail, ok, skipped, warn
from sidecar.doctor.host import Host
from sidecar.doctor.namespaces import forwarder
from sidecar.doctor.situation import DoctorOptions, EngineSeen, Situation
from sidecar.doctor.threads import in_thread
from sidecar.engine.info import NEWEST_KNOWN, OLDEST_SUPPORTED, parse
from sidecar.errors import EngineError, EngineRefused, EngineUnreachable

REFUSED_KEY = ("401", "403")
CONTROL_ROUTE = "/update_weight_version"
INCOMPLETE = {"abort_all_requests": False}
"""Without ``new_version``."""
LOOK_KEY = "give the key that the engine was started with (--api-key) by --engine-api-key-file"
CONTROL_KEY = "give the engine's --admin-api-key by --engine-admin-key-file (its --api-key, if it has no other)"


async def look(options: DoctorOptions, host: Host) -> tuple[EngineSeen, list[Finding]]:
    """What is seen of the engine, and whether it is there and takes the keys."""
    process = await in_thread(lambda: host.listener(options.engine_url), options.timeout_s)
    skew_s = await wire.skew(options.engine_url, options.api_key, host.now, options.timeout_s)
    seen = EngineSeen(process=process, forwarder=forwarder(host, process.partition("/")[0]), skew_s=skew_s)
    try:
        described = await wire.asked(options.engine_url, options.api_key, "/server_info", options.timeout_s)
    except EngineError as error:
        return seen, [*_no_answer(options, error)]
    if not {"version", "tp_size"} <= described.keys():
        return seen, [_not_sglang(options, "its /server_info names no version and no tp_size"), _keys_unknown()]
    answered = ok(Check.ENGINE, f"an SGLang server answers at {options.engine_url}")
    return _understood(seen, described), [answered, await _control(options)]


def _understood(seen: EngineSeen, described: dict[str, Any]) -> EngineSeen:
    """What is kept of what it says; the rest, its keys among it, is forgotten here."""
    info = replace(parse(described), process=seen.process)
    return replace(seen, info=info, memory_saver=bool(described.get("enable_memory_saver")))


def _no_answer(options: DoctorOptions, error: EngineError) -> Iterator[Finding]:
    if isinstance(error, EngineRefused) and error.details.get("httpStatus") in REFUSED_KEY:
        yield skipped(Check.ENGINE, "a server answers, but tells what it is only to those who have its key")
        yield _wrong_key("/server_info", options.api_key, LOOK_KEY)
        return
    if isinstance(error, EngineRefused) and error.details.get("httpStatus", "").startswith("5"):
        yield fail(Check.ENGINE, error.message, "wait until the server has started, or look at its log")
    elif isinstance(error, EngineRefused):
        yield _not_sglang(options, error.message.partition(";")[0])
    elif isinstance(error, EngineUnreachable):
        yield fail(Check.ENGINE, error.message.partition(";")[0], "start the SGLang server, or correct --engine-url")
    else:
        fix = "look at the server's log: it hangs, is loading, or is no HTTP server; --timeout gives it longer"
        yield fail(Check.ENGINE, error.message.partition(";")[0], fix)
    yield _keys_unknown()


def _not_sglang(options: DoctorOptions, why: str) -> Finding:
    fix = f"name the SGLang server itself (of {OLDEST_SUPPORTED} or later), neither a router nor another program"
    return fail(Check.ENGINE, f"what answers at {options.engine_url} is not SGLang: {why}", fix)


def _keys_unknown() -> Finding:
    return skipped(Check.KEYS, "no SGLang server has answered")


async def _control(options: DoctorOptions) -> Finding:
    """Whether the routes that an update uses take the key."""
    key = options.admin_key or options.api_key
    try:
        await wire.posted(options.engine_url, key, CONTROL_ROUTE, INCOMPLETE, options.timeout_s)
    except EngineRefused as refusal:
        if refusal.details.get("httpStatus") in REFUSED_KEY:
            return _wrong_key(CONTROL_ROUTE, key, CONTROL_KEY)
    except EngineError as error:
        return warn(Check.KEYS, f"whether control routes take the key is not known: {error.message}", "ask again")
    said = "takes the keys given" if key else "asks for no key"
    return ok(Check.KEYS, f"the engine {said}, for looks and for control")


def _wrong_key(path: str, key: str, fix: str) -> Finding:
    problem = "is not the one that it wants" if key else "was not given"
    return fail(Check.KEYS, f"the engine refuses {path}: the key {problem}", fix)


def release(situation: Situation) -> Iterable[Finding]:
    """Whether this release, so started, can be updated at all."""
    info = situation.engine.info
    if info is None:
        return [skipped(Check.RELEASE, "the engine has not said what it is")]
    if info.unsupported:
        return [fail(Check.RELEASE, f"updates are refused: {info.unsupported}", _mend(info.unsupported))]
    layout = f"tp_size {info.tp_size} on {info.device}, {info.nnodes} node" + "s" * (info.nnodes > 1)
    if info.is_unknown:
        newer = f"SGLang {info.version} is newer than {NEWEST_KNOWN}, the newest known; its routes are asked for"
        return [warn(Check.RELEASE, newer, "look for a newer sidecar, or at the log of this one")]
    return [ok(Check.RELEASE, f"SGLang {info.version} (dialect {info.dialect.name}), {layout}")]


def _mend(unsupported: str) -> str:
    if "older than" in unsupported or "no version" in unsupported:
        return f"run SGLang {OLDEST_SUPPORTED} or later"
    return "start the server without that setting; docs/engine.md lists what can be updated"


def ranks(situation: Situation) -> Iterable[Finding]:
    """Whether the trainer has as many TP ranks as the engine."""
    info, wanted = situation.engine.info, situation.options.ranks
    if info is None or wanted is None:
        return [skipped(Check.RANKS, "--ranks was not given" if info else "the engine has not said what it is")]
    if info.tp_size == wanted:
        return [ok(Check.RANKS, f"{wanted} TP ranks on both sides")]
    reason = f"the trainer has {wanted} TP ranks, the engine tp_size {info.tp_size}"
    fix = f"start the engine with --tp-size {wanted}, or send from {info.tp_size} ranks"
    return [fail(Check.RANKS, reason, fix)]


def memory_saver(situation: Situation) -> Iterable[Finding]:
    """Whether its weights may be away when an update comes."""
    if situation.engine.info is None:
        return [skipped(Check.MEMORY_SAVER, "the engine has not said what it is")]
    if situation.engine.memory_saver:
        reason = "the engine may release its weights' memory: resume the tag 'weights' before each update"
        return [ok(Check.MEMORY_SAVER, reason)]
    return [ok(Check.MEMORY_SAVER, "the engine keeps its weights in memory")]
