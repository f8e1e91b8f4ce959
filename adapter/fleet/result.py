"""What became of a fleet's update, engine by engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from adapter.errors import WeightSyncError
from adapter.wire import UpdateResult


class EngineState(StrEnum):
    """Where an engine stands after an update of its fleet."""

    PUBLISHED = "published"
    """It serves the new version."""
    UNTOUCHED = "untouched"
    """It has nothing of the new version, and serves what it served before, unless it is fenced."""
    DIRTY = "dirty"
    """It holds weights of no one version, or of one that was not published: generation is paused."""
    UNREACHABLE = "unreachable"
    """Its sidecar does not answer, or says that its engine does not; nobody knows what it serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """One engine's."""

    target: str
    """Its sidecar."""
    state: EngineState
    error: str = ""
    """Why it is not published, in a sentence."""
    fenced: bool = False
    """Whether its sidecar was told to take it out of service."""
    update: UpdateResult | None = None
    """How it went there, as its sidecar tells it, if it is published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetResult:
    """An update that was published."""

    weight_version: str
    engines: Mapping[str, EngineResult]
    """By target."""
    num_buckets: int
    num_bytes: int
    """Broadcast, once for all engines."""
    attempts: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By step of this process: join, begin, prepare, broadcast, publish."""
    slowest: str = ""
    """The engine that was waited for longest, and in which step."""

    @property
    def published(self) -> list[str]:
        """Targets of the engines that serve the version."""
        return [target for target, engine in self.engines.items() if engine.state is EngineState.PUBLISHED]

    @property
    def left_behind(self) -> list[str]:
        """Targets of the others."""
        return [target for target, engine in self.engines.items() if engine.state is not EngineState.PUBLISHED]


class FleetUpdateFailed(WeightSyncError):
    """Too few engines took the update: it was not published."""

    def __init__(
        self,
        message: str,
        engines: Mapping[str, EngineResult] | None = None,  # absent where it is unpickled: they come after
        errors: Mapping[str, WeightSyncError] | None = None,
    ) -> None:
        super().__init__(message)
        self.engines = dict(engines or {})
        """By target: what happened."""
        self.errors = dict(errors or {})
        """By target: why, of those that have a reason."""
