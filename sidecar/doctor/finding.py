"""What one look found: which check, how it ended, why, and what to do.

Invariant: a finding that is not ``ok`` or ``skipped`` has a fix. Names of checks are stable, for programs.
"""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    """It may work; what could be in its way is named."""
    FAIL = "fail"
    """It will not work so."""
    SKIPPED = "skipped"
    """Not looked at, or of no importance here; the reason says which."""


class Check(StrEnum):
    """What is looked at, in the order of the report."""

    ENGINE = "engine"
    KEYS = "keys"
    RELEASE = "release"
    RANKS = "ranks"
    PROCESS = "process"
    USER = "user"
    PID_NAMESPACE = "pid_namespace"
    SHM_VIEW = "shm_view"
    GPUS = "gpus"
    ALLOCATOR = "allocator"
    ENGINE_ALLOCATOR = "engine_allocator"
    MEMORY_SAVER = "memory_saver"
    CPU_SHARING = "cpu_sharing"
    SHM_SPACE = "shm_space"
    OPEN_FILES = "open_files"
    MANIFEST = "manifest"
    CLOCK = "clock"
    PROXIES = "proxies"
    LISTEN = "listen"
    TARGET = "target"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: Check
    verdict: Verdict
    reason: str
    """One sentence, without its full stop."""
    fix: str = ""
    """What to do, in one sentence; empty where nothing is to be done."""

    def __post_init__(self) -> None:
        assert self.fix or self.verdict in (Verdict.OK, Verdict.SKIPPED), f"{self.check}: what to do is not said"


def ok(check: Check, reason: str) -> Finding:
    """It is as it must be."""
    return Finding(check, Verdict.OK, reason)


def warn(check: Check, reason: str, fix: str) -> Finding:
    """It may work."""
    return Finding(check, Verdict.WARN, reason, fix)


def fail(check: Check, reason: str, fix: str) -> Finding:
    """It will not work."""
    return Finding(check, Verdict.FAIL, reason, fix)


def skipped(check: Check, reason: str) -> Finding:
    """It was not looked at."""
    return Finding(check, Verdict.SKIPPED, reason)
