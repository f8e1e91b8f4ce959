"""All checks, in the order of the report.

Invariant: ``examine`` always returns one finding or more per check, each within its time; a check that breaks, or does
not end, is itself a finding. No secret is in any of them.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from sidecar.doctor import engine, gpus, limits, memory, namespaces, network, sockets
from sidecar.doctor.finding import Check, Finding, fail
from sidecar.doctor.host import Host
from sidecar.doctor.situation import DoctorOptions, EngineSeen, Situation
from sidecar.doctor.threads import in_thread

HIDDEN = "***"
LOOKS_AT_THE_ENGINE = 4
"""Each with the time of one look."""

Look = Callable[[Situation], Iterable[Finding]]

CHECKS: Sequence[tuple[Check, Look]] = (
    (Check.RELEASE, engine.release),
    (Check.RANKS, engine.ranks),
    (Check.PROCESS, namespaces.process),
    (Check.USER, namespaces.user),
    (Check.PID_NAMESPACE, namespaces.pid_namespace),
    (Check.SHM_VIEW, namespaces.shm_view),
    (Check.GPUS, gpus.visible),
    (Check.ALLOCATOR, memory.allocator),
    (Check.ENGINE_ALLOCATOR, memory.engine_allocator),
    (Check.MEMORY_SAVER, engine.memory_saver),
    (Check.CPU_SHARING, namespaces.cpu_sharing),
    (Check.SHM_SPACE, limits.shm_space),
    (Check.OPEN_FILES, limits.open_files),
    (Check.MANIFEST, limits.manifest),
    (Check.CLOCK, network.clock),
    (Check.PROXIES, network.proxies),
    (Check.LISTEN, sockets.listen),
    (Check.TARGET, sockets.target),
)


async def examine(options: DoctorOptions, host: Host) -> list[Finding]:
    """Everything that is found; never raises for what it finds."""
    seen, findings = await _engine(options, host)
    situation = Situation(options, host, seen)
    for check, look in CHECKS:
        findings += await _guarded(check, look, situation)
    return [_without(options.secrets, finding) for finding in findings]


async def _engine(options: DoctorOptions, host: Host) -> tuple[EngineSeen, list[Finding]]:
    try:
        async with asyncio.timeout(LOOKS_AT_THE_ENGINE * options.timeout_s):
            return await engine.look(options, host)
    except Exception as error:  # noqa: BLE001 - the edge: what breaks is told, and the other checks go on
        return EngineSeen(), [_broken(Check.ENGINE, error)]


async def _guarded(check: Check, look: Look, situation: Situation) -> list[Finding]:
    try:
        return await in_thread(lambda: list(look(situation)), situation.options.timeout_s)
    except TimeoutError:
        fix = "look for a file system that hangs (NFS, FUSE); --timeout gives it longer"
        return [fail(check, f"the look did not end within {situation.options.timeout_s:g} s", fix)]
    except Exception as error:  # noqa: BLE001 - the same edge
        return [_broken(check, error)]


def _broken(check: Check, error: Exception) -> Finding:
    reason = f"the check itself broke: {type(error).__name__}: {error}"
    return fail(check, reason, "report this as a defect of the doctor; the other checks stand")


def _without(secrets: Sequence[str], finding: Finding) -> Finding:
    reason, fix = finding.reason, finding.fix
    for secret in secrets:
        reason, fix = reason.replace(secret, HIDDEN), fix.replace(secret, HIDDEN)
    return replace(finding, reason=reason, fix=fix)
