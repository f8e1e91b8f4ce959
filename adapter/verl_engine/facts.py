"""What every rank knows of the engine once it is up. Invariant: it is JSON, so that rank 0 can tell the others."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, Self

from adapter.errors import LaunchError
from adapter.launch import ProcessFacts
from sidecar.v1 import weight_sync_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The engine and its sidecar."""

    sidecar: str
    server_url: str | None = None
    """None on a rank that was not told and cannot know."""
    processes: Mapping[str, Sequence[ProcessFacts]] = field(default_factory=dict)
    """Those that were started for it, by host (see ``host_identity``), rank 0's first."""
    frees_memory: bool = True
    """Whether releasing memory has an effect (enable_memory_saver)."""
    keeps_weights: bool = False
    """Whether released weights come back with their content."""
    last_version: int = 0
    """The largest decimal weight_version that the sidecar knows of."""

    def log_of(self, name: str) -> str | None:
        """Where this process writes to, if it was started for this engine."""
        everywhere = chain.from_iterable(self.processes.values())
        return next((process.log_path for process in everywhere if process.name == name), None)

    def check_alive(self, host: str) -> None:
        """Raise ``LaunchError`` if a process has ended, as far as this host shows it."""
        for process in self.processes.get(host, ()):
            if process.has_ended():
                raise LaunchError(f"{process.name} has ended{process.log_tail()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a rank tells the others when there is nothing left that it waits for."""

    host: str
    processes: Sequence[ProcessFacts]
    """Those that it has started."""
    engine: EngineFacts | None
    """On rank 0, and on ranks that cannot be told."""

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What another rank has said."""
        processes = [ProcessFacts(**process) for process in content["processes"]]
        engine = EngineFacts(**content["engine"]) if content["engine"] is not None else None
        return cls(host=content["host"], processes=processes, engine=engine)


def facts_of_all(ranks: Sequence[Ready]) -> EngineFacts:
    """Rank 0's, with the processes of all."""
    by_host: dict[str, list[ProcessFacts]] = {}
    for rank in ranks:
        by_host.setdefault(rank.host, []).extend(rank.processes)
    assert ranks[0].engine is not None, "rank 0 looks at the engine"
    return replace(ranks[0].engine, processes=by_host)


def largest_version(status: pb.GetStatusResponse) -> int:
    """Of the decimal versions in it; 0 if there is none.

    Not of an update that still waits for ranks: the rank that asks may be one of those, and must count as they did.
    """
    current = status.current_update
    waits = current.state == pb.UPDATE_STATE_COLLECTING
    versions = [status.weight_version, status.last_update.weight_version, "" if waits else current.weight_version]
    return max((int(version) for version in versions if version.isdecimal()), default=0)


def memory_facts(server_info: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether releasing memory frees any, and whether weights come back with their content.

    Nothing else of ``/server_info`` is kept: it holds the server's keys in clear.
    """
    frees = bool(server_info.get("enable_memory_saver"))
    return frees, not frees or bool(server_info.get("enable_weights_cpu_backup"))
