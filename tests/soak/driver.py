"""The soak itself: draws a step, carries it out, writes it down, and looks whether the engine is where the log says.

Invariant: after every step the sidecar's state and version, and wherever the log can know them the engine's checksums
on every rank, are those that the log predicts; every update without a fault is committed.
"""

import functools
import itertools
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

from adapter.errors import WeightSyncError
from adapter.staging import DEFAULT_BUFFERS
from tests.soak import draw, samples
from tests.soak.content import rank_checksums, whole
from tests.soak.draw import Step
from tests.soak.faults import KINDS, PATIENT_S, WEIGHTS, act_of
from tests.soak.log import SoakLog
from tests.soak.prediction import AT_FIRST, COMMITTED, FAILED, Expected, content_digest, follow
from tests.soak.world import TP_SIZE, World, wait_until

REPORT_EVERY = 20
SAMPLE_EVERY = 10
# Between updates, for the traffic to get something done.
MAX_PAUSE_S = 0.4
_STATE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How one step went."""

    outcome: str
    seconds: float
    reports: list[dict[str, Any] | None]
    """By rank; None of one that died."""

    @property
    def errors(self) -> list[str]:
        """By rank; empty of one that was told that the update is served."""
        return ["died" if report is None else report.get("error", "") for report in self.reports]


class Soak:
    """One run: ``num_updates`` with a fault every ``fault_every`` of them, an even number."""

    def __init__(self, world: World, log: SoakLog, *, seed: int, num_updates: int, fault_every: int) -> None:
        assert fault_every % 2 == 0, "faults and samples must not fall on the same step"
        self._world = world
        self._log = log
        self._rng = random.Random(seed)
        self._kinds = draw.faults(self._rng, WEIGHTS)
        self._num_updates = num_updates
        self._fault_every = fault_every
        self._num_followed = 0
        self.expected: Expected = AT_FIRST
        log.write("begin", seed=seed, updates=num_updates, fault_every=fault_every, tp_size=TP_SIZE)

    def run(self) -> None:
        """All steps, and one that heals if need be; an ``AssertionError`` at the first that is not as it must be."""
        for number in itertools.count(1):
            if number > self._num_updates and self.expected.content is not None:
                return
            self._carry_out(self._draw(number))
            time.sleep(self._rng.uniform(0.0, MAX_PAUSE_S))
            if number % SAMPLE_EVERY == SAMPLE_EVERY - 1:
                self._sample(number)
            if number % REPORT_EVERY == 0:
                print(f"soak: {number} of {self._num_updates} updates", file=sys.stderr, flush=True)

    def _draw(self, number: int) -> Step:
        unknown = self.expected.content is None
        # Odd steps are healthy ones, and so are the last.
        if number % self._fault_every == self._fault_every // 2 // 2 * 2 and number <= self._num_updates:
            fault = draw.fault(self._rng, next(self._kinds))
            return draw.step(self._rng, number, whole=unknown, fault=fault, bucketed=KINDS[fault.kind].bucketed)
        from_disk = unknown and draw.healing_from_disk(self._rng) and self._world.loads_from_disk
        return draw.step(self._rng, number, whole=unknown, fault=None, bucketed=False, from_disk=from_disk)

    def _carry_out(self, step: Step) -> None:
        began = time.monotonic()
        ended = self._from_disk(step) if step.from_disk else self._from_ranks(step)
        self._log.write(
            "update", **step.fields(), outcome=ended.outcome, seconds=round(ended.seconds, 3), errors=ended.errors
        )
        self._follow()
        self._note_served(step, ended.outcome, began)
        _check_outcome(step, ended)
        self._world.replace_dead_engine(step.step)
        self._world.replace_dead_ranks(step.step)
        self._follow()
        self._check_engine(step)

    def _from_ranks(self, step: Step) -> Ended:
        world, fault, started = self._world, step.fault, time.monotonic()
        timeout_s = KINDS[fault.kind].timeout_s(fault) if fault else PATIENT_S
        digest = content_digest({**(self.expected.content or {}), **step.content})
        for rank in world.ranks:
            rank.start_update(_command(step, rank.rank, timeout_s, digest))
        if fault:
            KINDS[fault.kind].during(world, fault, step.step)
        reports = [rank.finish_update(timeout_s) for rank in world.ranks]
        return Ended(world.outcome(step.update_id, step.version), time.monotonic() - started, reports)

    def _from_disk(self, step: Step) -> Ended:
        started = time.monotonic()
        report: dict[str, Any] = {"posts": step.buckets, "unreleased": 0}
        try:
            checkpoint = self._world.checkpoint(whole(step.seed))
            self._world.control.update_weights_from_disk(version=step.version, model_path=str(checkpoint))
        except WeightSyncError as error:
            report["error"] = str(error)
        return Ended(self._world.outcome(step.update_id, step.version), time.monotonic() - started, [report])

    # What is held true of it.

    def _follow(self) -> None:
        """Takes in what the log has by now."""
        lines = self._log.lines[self._num_followed :]
        self.expected = functools.reduce(follow, lines, self.expected)
        self._num_followed += len(lines)

    def _note_served(self, step: Step, outcome: str, began: float) -> None:
        """For the traffic's answers: what may be served from when."""
        served = self._world.served
        if outcome == COMMITTED:
            served.published(step.version, self.expected.digest, began, time.monotonic())
        elif outcome == FAILED and step.fault and step.fault.kind == "sidecar killed":
            served.perhaps_published(step.version, "", began)

    def _check_engine(self, step: Step) -> None:
        expected, world = self.expected, self._world
        where = f"after step {step.step} ({step.fault})"
        wait_until(lambda: world.state == expected.state, _STATE_TIMEOUT_S, f"{where}: not {expected.state}")
        assert world.version == expected.version, where
        if expected.content is not None:
            assert world.http.weight_version() == expected.version, where
            assert world.http.rank_checksums() == rank_checksums(expected.content, TP_SIZE), where

    def _sample(self, number: int) -> None:
        world = self._world
        live = samples.torch_files(rank.pid for rank in world.ranks)
        dead = samples.torch_files(world.dead_rank_pids)
        self._log.write(
            "sample",
            step=number,
            processes=samples.as_fields(samples.sample(world.roles(), world.helper_fds())),
            live_files=len(live),
            dead_files=len(dead),
            dead_bytes=sum(path.stat().st_size for path in dead),
        )
        assert not live, f"step {number}: {live} lie in /dev/shm after a healthy update"
        # They go with the server; see ``World.wait_for_helpers``.
        assert len(dead) <= DEFAULT_BUFFERS * len(world.dead_rank_pids), dead


def _command(step: Step, rank: int, timeout_s: float, digest: str) -> dict[str, Any]:
    return {
        "allow_missing": [] if step.whole else ["*"],
        "verify": step.verify,
        "content_digest": digest,
        "version": step.version,
        "seed": step.seed,
        "names": step.names,
        "bucket_bytes": step.bucket_bytes,
        "timeout_s": timeout_s,
        **act_of(step.fault, rank, len(step.names)),
    }


def _check_outcome(step: Step, ended: Ended) -> None:
    allowed = KINDS[step.fault.kind].outcomes if step.fault else {COMMITTED}
    what = f"step {step.step} ({step.fault}): {ended}"
    assert ended.outcome in allowed, what
    assert ended.outcome == COMMITTED or all(ended.errors), f"a rank was told that it is served: {what}"
    if step.fault is None:
        assert not any(ended.errors), what
        assert [report and report["posts"] for report in ended.reports] == [step.buckets] * len(ended.reports), what
        assert [report and report["unreleased"] for report in ended.reports] == [0] * len(ended.reports), what
