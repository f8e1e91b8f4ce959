"""A trainer's rank or the engine killed in the middle of a bucketed update on a GPU, and the healthy update after it.

The weights are negated before every update, so a first update of any new rank sends the same ones as version 1 did.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter.exports import SHM
from sidecar.v1 import weight_sync_pb2 as pb
from tests.gpu import figures
from tests.gpu.conftest import Rank, Setup, gpu_used_mib, running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560)]

GIB = 1 << 30
MOMENT_S = 60.0
"""For what takes milliseconds, or the seconds in which a server dies."""
SLACK_MIB = 64
"""Of the device's memory: what the driver keeps for a process that runs."""


@pytest.fixture
def middle(tmp_path: Path) -> Iterator[Setup]:
    """Four buckets of 1 GiB at most."""
    with running(tmp_path, shape="middle", tp_size=1, bucket_bytes=GIB) as setup:
        yield setup


def test_a_rank_killed_between_its_buckets_leaves_a_dirty_engine_that_its_successor_heals(middle: Setup) -> None:
    first = _Healthy(middle, middle.ranks.ranks[0])
    first.stalls_before_bucket(2, version="2")
    killed = time.monotonic()
    first.rank.kill()
    outcome = _outcome(middle, "2")
    noticed_s = time.monotonic() - killed
    assert pb.UpdateState.Name(outcome.state) == "UPDATE_STATE_FAILED", outcome.error
    assert _last_phase(outcome) == "PHASE_LOAD"
    assert "rank 0" in outcome.error
    assert middle.sidecar.status().state == pb.SIDECAR_STATE_DIRTY
    left_mib = gpu_used_mib()
    first.is_followed_by_a_healthy_rank(version="3")
    figures.keep("rank killed between its buckets", {"noticed_s": noticed_s, "left_mib": left_mib, **first.seen})


def test_a_rank_killed_before_the_engine_has_opened_its_bucket(middle: Setup) -> None:
    """The bucket is posted and its owner gone when the scheduler comes to it."""
    first = _Healthy(middle, middle.ranks.ranks[0])
    first.stalls_before_bucket(1, version="2")
    with _stopped(middle.schedulers()):
        first.rank.tell(go="on")
        _wait_until(middle, lambda current: current.num_posted == 2)
        first.rank.kill()
    _is_told_right_and_healed(middle, first, "rank killed before the engine opened its bucket")


def test_a_rank_killed_while_the_engine_loads_its_bucket(middle: Setup) -> None:
    first = _Healthy(middle, middle.ranks.ranks[0])
    first.rank.tell(do="update", version="2")
    _wait_until(middle, lambda current: current.num_posted >= 1)
    first.rank.kill()
    _is_told_right_and_healed(middle, first, "rank killed while the engine loaded its bucket")


def test_an_engine_killed_in_the_middle_of_a_load_leaves_its_trainer_no_memory_out(tmp_path: Path) -> None:
    with running(tmp_path, shape="8b", tp_size=1, bucket_bytes=2 * GIB) as setup:
        rank = setup.ranks.ranks[0]
        start = rank.do(do="memory")
        assert rank.do(do="update", version="1")["weight_version"] == "1"
        served = setup.engine.rank_checksums()
        rank.tell(do="update", version="2")
        _wait_until(setup, lambda current: current.num_posted >= 1)
        _signal(setup.schedulers(), signal.SIGSTOP)  # now its answer can no longer come
        assert setup.sidecar.status().current_update.state == pb.UPDATE_STATE_APPLYING
        setup.kill_engine()
        failed, outcome = rank.answer(), _outcome(setup, "2")
        assert pb.UpdateState.Name(outcome.state) == "UPDATE_STATE_ABORTED", outcome.error
        assert _last_phase(outcome) == "PHASE_LOAD"
        assert 1 <= outcome.num_posted <= outcome.num_buckets
        assert failed["error"] == "UpdateAborted"
        assert rank.do(do="memory") == start
        setup.restart_engine()
        _wait_for_state(setup, pb.SIDECAR_STATE_UNSYNCED)
        assert rank.do(do="update", version="3")["weight_version"] == "3"
        assert setup.engine.rank_checksums() == served
        assert rank.do(do="memory") == start
        seen = {"posted": outcome.num_posted, "buckets": outcome.num_buckets, "told_s": failed["seconds"], **start}
        figures.keep("engine killed while it loaded", seen)


class _Healthy:
    """A rank after its first update, and what was seen then."""

    def __init__(self, setup: Setup, rank: Rank) -> None:
        self.setup, self.rank = setup, rank
        self.start = rank.do(do="memory")
        assert rank.do(do="update", version="1")["weight_version"] == "1"
        assert rank.do(do="memory") == self.start
        self.checksums = setup.engine.rank_checksums()
        self.seen: dict[str, Any] = {"before_mib": gpu_used_mib()}

    def stalls_before_bucket(self, bucket: int, version: str) -> None:
        """Returns when the engine has loaded what comes before it, and waits."""
        loads = self.setup.num_loads()
        self.rank.tell(do="stall", version=version, bucket=bucket)
        _wait_until(self.setup, lambda _: self.setup.num_loads() == loads + bucket)

    def is_followed_by_a_healthy_rank(self, version: str) -> None:
        """The same weights arrive from a new process, and the device's memory is as it was."""
        second = self.setup.start_rank()
        assert second.do(do="update", version=version)["weight_version"] == version
        assert self.setup.engine.rank_checksums() == self.checksums
        assert self.setup.engine.weight_version() == version
        assert self.setup.sidecar.status().state == pb.SIDECAR_STATE_READY
        assert second.do(do="memory") == self.start
        self.seen |= {"after_mib": gpu_used_mib(), "files_left": _remove_files_of(self.rank.pid)}
        assert abs(self.seen["after_mib"] - self.seen["before_mib"]) <= SLACK_MIB


def _is_told_right_and_healed(setup: Setup, first: _Healthy, what: str) -> None:
    """The engine lives and is dirty, or it died of memory that had gone and nothing is left to be dirty."""
    outcome = _outcome(setup, "2")
    left_mib = gpu_used_mib()
    assert _last_phase(outcome) == "PHASE_LOAD"
    if outcome.state == pb.UPDATE_STATE_FAILED:
        assert setup.sidecar.status().state == pb.SIDECAR_STATE_DIRTY
    else:
        assert pb.UpdateState.Name(outcome.state) == "UPDATE_STATE_ABORTED", outcome.error
        assert setup.server.process.wait_exit(MOMENT_S), "the update was given up, but the engine lives"
        setup.restart_engine()
        _wait_for_state(setup, pb.SIDECAR_STATE_UNSYNCED)
    first.is_followed_by_a_healthy_rank(version="3")
    state, posted = pb.UpdateState.Name(outcome.state), outcome.num_posted
    seen = {"state": state, "error": outcome.error, "posted": posted, "left_mib": left_mib, **first.seen}
    figures.keep(what, seen)


def _remove_files_of(pid: int) -> dict[str, int]:
    """What a process that was killed has left in shared memory, and its bytes: torch's file of counters."""
    left = {path.name: path.stat().st_size for path in SHM.glob(f"torch_{pid}_*")}
    for name in left:
        (SHM / name).unlink()
    return left


def _wait_until(setup: Setup, reached: Callable[[pb.UpdateOutcome], bool]) -> None:
    """Until the update in hand has come that far; without a pause, since it lasts for milliseconds."""
    sidecar, give_up = setup.sidecar, time.monotonic() + MOMENT_S
    while not reached(current := sidecar.status().current_update):
        assert time.monotonic() < give_up, f"the update never came that far: {current}"


def _outcome(setup: Setup, update_id: str) -> pb.UpdateOutcome:
    """How the update ended."""
    sidecar, give_up = setup.sidecar, time.monotonic() + MOMENT_S
    while (last := sidecar.status().last_update).update_id != update_id:
        assert time.monotonic() < give_up, f"update {update_id} has not ended"
        time.sleep(0.01)
    return last


def _last_phase(outcome: pb.UpdateOutcome) -> str:
    return pb.Phase.Name(outcome.phases[-1].phase)


def _wait_for_state(setup: Setup, state: pb.SidecarState.ValueType) -> None:
    sidecar, give_up = setup.sidecar, time.monotonic() + MOMENT_S
    while (status := sidecar.status()).state != state:
        assert time.monotonic() < give_up, f"the sidecar is in {pb.SidecarState.Name(status.state)}: {status.reason}"
        time.sleep(0.1)


@contextmanager
def _stopped(pids: list[int]) -> Iterator[None]:
    assert pids, "the engine has no scheduler by the name that is looked for"
    _signal(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)
