"""Three scripted engines, each with a sidecar of its own, as one fleet whose broadcasts bring nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from adapter.errors import GroupBroken
from adapter.fleet import Discovery, EngineState, Fleet, FleetResult, FleetUpdateFailed
from benchmarks.fleet.no_network import NoNetwork
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import ScriptedEngine
from tests.integration.groups import BEGIN, END, FLUSH, PAUSE, PUBLISH, RECEIVE, RESUME
from tests.integration.support import Pair, wait_until

ONE_TENSOR = 64
NUM_BUCKETS = 2
WEIGHTS = [(f"layer.{number}.weight", torch.arange(6.0).reshape(2, 3)) for number in range(NUM_BUCKETS)]
WHOLE_UPDATE = [PAUSE, BEGIN, *[RECEIVE] * NUM_BUCKETS, END, FLUSH, PUBLISH, RESUME]
LET_GO = [PAUSE, BEGIN, END, RESUME]
TIMEOUT_S = 40.0


class Named(NoNetwork):
    """Remembers which groups were made, of how many ranks, and from which members were turned away, and until when."""

    made: ClassVar[list[tuple[str, int]]] = []
    turned_away: ClassVar[list[tuple[str, bool, Callable[[], bool]]]] = []

    def __init__(self, name: str, world_size: int, backend: str, join_s: float, timeout_s: float) -> None:
        super().__init__(name, world_size, backend, join_s, timeout_s)
        self.made.append((name, world_size))

    def turn_away(self, over: Callable[[], bool], seconds: float) -> None:
        assert self.is_closed, "who is let in before that waits for all"
        self.turned_away.append((self.name, over(), over))


class NeverWhole(Named):
    """The first one: this process waits in vain, as it does in torch, until the group is closed."""

    def join(self) -> None:
        while len(self.made) == 1 and not self.is_closed:
            time.sleep(0.01)
        if self.is_closed:
            raise GroupBroken("it was closed")


class Trio:
    """The members, and who was told to have been fenced."""

    def __init__(self, folder: Path) -> None:
        self.pairs: list[Pair] = []
        for number in range(3):
            (place := folder / str(number)).mkdir()
            self.pairs.append(Pair(ScriptedEngine(tp_size=1 + number % 2), place))
        self.fenced: dict[str, str] = {}
        self.test = 0

    @property
    def targets(self) -> list[str]:
        return [pair.target for pair in self.pairs]

    @property
    def versions(self) -> list[str]:
        """What the engines themselves say."""
        return [pair.engine.weight_version for pair in self.pairs]

    def fleet(self, members: Iterable[str] | Discovery | None = None, **options: object) -> Fleet:
        fields: dict[str, object] = {"bucket_bytes": ONE_TENSOR, "device": "cpu", "make_group": Named} | options
        return Fleet(members or self.targets, on_fenced=self.fenced.__setitem__, **fields)  # type: ignore[arg-type]

    def mark(self) -> None:
        """Count POSTs, groups and fences from here."""
        for pair in self.pairs:
            pair.mark()
        self.fenced.clear()
        Named.made.clear()
        Named.turned_away.clear()

    def posts(self) -> list[list[str]]:
        """To each engine since the mark, but for joining and leaving groups."""
        return [[path for path in pair.posts() if not path.endswith("_weights_update_group")] for pair in self.pairs]

    def sidecars(self) -> list[tuple[str, pb.SidecarState.ValueType]]:
        """What the sidecars say: version and state."""
        return [(status.weight_version, status.state) for status in (pair.status() for pair in self.pairs)]

    def v(self, number: int) -> str:
        """A version of this test's own: no engine has served it before. 0 is what all serve at first."""
        return f"test {self.test}, {number}"

    def heal(self) -> None:
        """Whatever a test did: all serve a version that is new, and nothing is planned."""
        self.test += 1
        for pair in self.pairs:
            pair.engine.forget_faults()
        with self.fleet() as fleet:
            update(fleet, self.v(0))

    def close(self) -> None:
        for pair in self.pairs:
            pair.close()
            pair.engine.close()


def restart(pair: Pair) -> None:
    """Another life of the engine, which its sidecar knows of."""
    epoch = pair.status().engine.epoch
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    pair.engine.restart()
    wait_until(lambda: pair.status().engine.epoch > epoch)


def update(fleet: Fleet, version: str) -> FleetResult:
    return fleet.update_weights(WEIGHTS, version=version, timeout=TIMEOUT_S)


def states(ended: FleetResult | FleetUpdateFailed, targets: Sequence[str]) -> list[EngineState]:
    return [ended.engines[target].state for target in targets]
