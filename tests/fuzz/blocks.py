"""Blocks of requests: each from a seed of its own, against one of the worlds; and what they found."""

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from tests.fakes import Fault
from tests.fuzz import kept
from tests.fuzz.calling import Answer, call
from tests.fuzz.scenarios import Request, Scenarios, Waves
from tests.fuzz.tally import Tally
from tests.fuzz.watching import LogWatch, LoopWatch, MemoryWatch
from tests.fuzz.world import KINDS, Kind, World, running

BLOCK = 1000
AT_ONCE = 3
"""Scenarios of one block that run at the same time."""
FAULTY = ("/pause_generation", "/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update")
FAULTS = (Fault.REFUSE, Fault.LOSE_REPLY, Fault.CUT)


class Run:
    """One process's worlds and what became of its blocks."""

    def __init__(self, seed: int) -> None:
        self.tally = Tally()
        self.memory = MemoryWatch()
        self._seed = seed
        self._log, self._loop = LogWatch(), LoopWatch()

    async def blocks(self, numbers: Iterable[int], size: int = BLOCK, kinds: Iterable[Kind] = KINDS) -> None:
        """All of these blocks, every world's one after the other, and the worlds beside one another."""
        queues: dict[str, list[int]] = {kind.name: [] for kind in KINDS}
        for number in numbers:
            queues[KINDS[number % len(KINDS)].name].append(number)
        async with self._worlds([kind for kind in kinds if queues[kind.name]]) as worlds:
            await asyncio.gather(*(self._queue(world, queues[world.kind.name], size) for world in worlds))

    async def again(self, requests: Iterable[kept.Kept]) -> None:
        """Requests that were kept, one after the other."""
        requests = list(requests)
        async with self._worlds([kind for kind in KINDS if kind.name in {one.kind for one in requests}]) as worlds:
            by_name = {world.kind.name: world for world in worlds}
            for one in requests:
                await self._request(by_name[one.kind], one.request, "kept")
                self._look(by_name[one.kind], f"kept: {one.what}")

    def _worlds(self, kinds: list[Kind]) -> "_Worlds":
        return _Worlds(kinds, self._log, self._loop)

    async def _queue(self, world: World, numbers: list[int], size: int) -> None:
        for number in numbers:
            await self._block(world, number, size)
            self.memory.sample()
            self.tally.longest_pause_s = self._loop.longest_s
        self.tally.counts["tracebacks of gRPC's own"] = self._log.by_grpc

    async def _block(self, world: World, number: int, size: int) -> None:
        name = f"{self._seed}:{number}"
        rng = random.Random(name)
        _plan_faults(world, rng)
        drawn = Scenarios(rng, world.facts, name).draw(size)
        lines = [self._line(world, drawn, name) for _ in range(AT_ONCE)]
        await asyncio.gather(*lines)
        world.engine.forget_faults()
        self._look(world, name)

    async def _line(self, world: World, drawn: Iterable[Waves], name: str) -> None:
        """One scenario after the other, of those that nobody else has taken."""
        for waves in drawn:
            holding = []
            for wave in waves:
                calls = [asyncio.create_task(self._request(world, request, name)) for request in wave]
                waited = [task for task, request in zip(calls, wave, strict=True) if not request.holds]
                holding += [task for task in calls if task not in waited]
                if waited:
                    await asyncio.wait(waited)
            if holding:
                await asyncio.wait(holding)

    async def _request(self, world: World, request: Request, name: str) -> None:
        answer = await call(world, request)
        self.tally.answered(request.method, answer.outcome, answer.seconds)
        said = {f"OK: {request.method}": answer.outcome == "OK", "by socket": request.by_socket}
        self.tally.counts.update([name for name, holds in said.items() if holds])
        self.tally.counts["cancelled"] += request.cancel_s is not None
        if answer.finding:
            self._found(world, request, answer, name)

    def _found(self, world: World, request: Request, answer: Answer, name: str) -> None:
        self.tally.findings.append(f"{name} {world.kind.name} {request.method}: {answer.finding}")
        if len(request.wire) < 1 << 20 and len(self.tally.findings) < 200:
            print(kept.written(world.kind.name, request, f"{name} {answer.finding}"[:300]), file=sys.stderr, flush=True)

    def _look(self, world: World, name: str) -> None:
        found = world.check_engine() + self._log.taken() + self._loop.taken()
        self.tally.findings += [f"{name} {what}" for what in found]
        for what in found:
            print(f"{name} {what}", file=sys.stderr, flush=True)
        self.tally.counts["bodies at the engine"] += _moved(world, "num_bodies")
        self.tally.counts["payloads at the engine"] += _moved(world, "num_payloads")


def _moved(world: World, counter: str) -> int:
    number = int(getattr(world.bodies, counter))
    setattr(world.bodies, counter, 0)
    return number


def _plan_faults(world: World, rng: random.Random) -> None:
    """In a third of all blocks the engine says no, or loses an answer, a few times."""
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        fault = rng.choice(FAULTS)
        said = rng.choice(("", "no\nnot \x00 at all", "漢" * 400, "{}"))
        world.engine.fault(rng.choice(FAULTY), fault, after=rng.randrange(5), message=said)


class _Worlds:
    """The worlds of one run, with the watches around them."""

    def __init__(self, kinds: list[Kind], log: LogWatch, loop: LoopWatch) -> None:
        self._kinds, self._log, self._loop = kinds, log, loop
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> list[World]:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz")))
        self._stack.enter_context(self._log)
        await self._stack.enter_async_context(self._loop)
        return [await self._stack.enter_async_context(running(kind, folder)) for kind in self._kinds]

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


def progress(run: Run, started: float) -> str:
    """One line for who waits."""
    total, seconds = run.tally.requests.total(), time.monotonic() - started
    rss = run.memory.rss_mb[-1] if run.memory.rss_mb else 0.0
    found = len(run.tally.findings)
    return f"{total:,} requests, {total / seconds:,.0f}/s, RSS {rss:.0f} MB, {found} findings"
