"""The matrix's kills on a real SGLang: trainer rank, sidecar and engine, in every phase that a request shows."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict

import pytest

from tests.faults import matrix
from tests.faults.matrix import Ending, Expected, What, When, Who
from tests.faults.ranks import RankProcess
from tests.faults.real_rig import RealRig
from tests.faults.rig import wait_until
from tests.faults.scene import LOAD, PATHS
from tests.faults.torch_rank import RealJob

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.timeout(300)]

TP2, TP1 = "tp2", "tp1"
ENGINE_PHASES = [when for when in When if when is not When.COLLECT]
"""While ranks arrive the engine has no part in an update."""
NUM_KILLS = len(ENGINE_PHASES) + 1
NOTICE_S = 0.5
UNDER_WAY_S = 0.3
"""For an answer that was given just before generation was held."""
NO_HANG_S = 30.0
EXPECTED = {
    (cell.who, cell.when): cell.expected
    for cell in matrix.cells()
    if cell.what is What.KILLED and not cell.unopened and isinstance(cell.expected, Expected)
}
KINDS = {
    matrix.COMMITTED: "",
    matrix.ABORTED: "UpdateAborted",
    matrix.FAILED: "UpdateFailed",
    matrix.UNKNOWN_FATE: "UpdateAborted",
    matrix.UNREACHABLE: "EngineUnreachable",
    f"{matrix.CUT}>{matrix.NOBODY}": "SidecarUnreachable",
}
"""What the adapter makes of it."""
OUTCOMES = {
    Ending.COMMITTED: "COMMITTED",
    Ending.ABORTED: "ABORTED",
    Ending.DIRTY: "FAILED",
    Ending.ENGINE_GONE: "ABORTED",
}


@pytest.fixture(scope="module", params=[TP2, TP1])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRig]:
    folder = tmp_path_factory.mktemp(request.param)
    made = RealRig(folder, tp_size=2) if request.param == TP2 else RealRig(folder, tp_size=1, num_kills=NUM_KILLS)
    with closing(made) as rig:
        yield rig


def on(server: str) -> pytest.MarkDecorator:
    """Which server's cells these are; those of one server come together."""
    return pytest.mark.parametrize("rig", [server], indirect=True, scope="module")


every_phase = pytest.mark.parametrize("when", list(When), ids=str)


@on(TP2)
@every_phase
def test_a_rank_is_killed(rig: RealRig, when: When) -> None:
    job = reach(rig, when, answered=True)
    rig.ranks[-1].kill()
    go_on(rig)
    check(rig, EXPECTED[Who.RANK, when], job, [] if when is When.COLLECT else rig.ranks[:1])
    heal(rig)


@on(TP2)
@every_phase
def test_a_sidecar_is_killed(rig: RealRig, when: When) -> None:
    job = reach(rig, when)
    rig.kill_sidecar()
    go_on(rig)
    callers = rig.ranks[1:] if when is When.COLLECT else rig.ranks
    saw = [rank.wait("done") for rank in callers]
    rig.start_sidecar()
    assert [one["saw"] for one in saw] == ["SidecarUnreachable"] * len(callers), saw
    check(rig, EXPECTED[Who.SIDECAR, when], job, [])
    heal(rig)


@on(TP1)
@pytest.mark.parametrize("when", ENGINE_PHASES, ids=str)
def test_an_engine_is_killed(rig: RealRig, when: When) -> None:
    job = reach(rig, when)
    rig.kill_engine()
    on_its_way = When.LOAD_FIRST if when is When.BETWEEN else when  # here an answer is, where the rig has nothing
    check(rig, EXPECTED[Who.ENGINE, on_its_way], job, rig.ranks)
    rig.replace_engine()
    heal(rig)


@on(TP1)
def test_an_engine_dies_of_memory_that_has_gone_with_its_owner_before_it_was_opened(rig: RealRig) -> None:
    """A process's first update: later its memory outlives it, for as long as the engine is connected to its helper."""
    rig.ranks[-1].kill()
    rig.replace_dead_rank()
    reach(rig, When.LOAD_FIRST)
    rig.ranks[-1].kill()
    wait_until(lambda: not rig.ranks[-1].memory(), "torch_shm_manager to tidy up")
    members = rig.engine.process.session_members()
    rig.proxy.release()
    assert rig.engine.process.wait_exit(60.0)
    rig.bury_engine(members)
    rig.replace_engine()
    heal(rig)


@on(TP2)
def test_after_all_that_the_weights_are_those_of_a_checkpoint_on_disk(rig: RealRig) -> None:
    rig.check_against_disk()


def reach(rig: RealRig, when: When, *, answered: bool = False) -> RealJob:
    """Start an update and return in that phase: at its request, or while a rank is missing.

    ``answered``: a load is held once it is done, so that its memory has been opened.
    """
    job = rig.next_job(verify=when is When.VERIFY)
    early: list[RankProcess] = rig.ranks[1:] if when is When.COLLECT else rig.ranks
    path = LOAD if when is When.BETWEEN else PATHS.get(when, "")
    skip = 1 if when is When.LOAD_LAST else 0
    held = rig.proxy.hold(path, skip=skip, answered=when is When.BETWEEN or (answered and path == LOAD))
    for rank in early:
        rank.start(asdict(job))
    if when is When.COLLECT:
        wait_until(lambda: list(rig.status().current_update.waiting_for_ranks) == [0], "a rank to arrive")
    else:
        assert held.reached.wait(30.0)
    return job


def go_on(rig: RealRig) -> None:
    """Once the sidecar has heard of a death."""
    time.sleep(NOTICE_S)
    rig.proxy.release()


def check(rig: RealRig, expected: Expected, job: RealJob, callers: list[RankProcess]) -> None:
    """What is seen before anything is healed."""
    started = time.monotonic()
    saw = [rank.wait("done") for rank in callers]
    for one, reason in zip(saw, expected.sees, strict=False):
        assert one["saw"] in {KINDS[reason] for reason in reason.split("|")}, one["error"]
    assert time.monotonic() - started < NO_HANG_S
    wait_until(lambda: rig.state() in expected.state.split("|"), f"state {expected.state}")
    if expected.ending in OUTCOMES:
        assert rig.outcome(job.version) == OUTCOMES[expected.ending]
    if expected.paused:
        wait_until(rig.is_held, "generation to be held")
        time.sleep(UNDER_WAY_S)
        held_since = time.monotonic()
        time.sleep(NOTICE_S)
        assert rig.traffic.answers(held_since) == []
    elif expected.ending is Ending.COMMITTED:
        rig.traffic.wait_for(job.version)


def heal(rig: RealRig) -> None:
    """A complete update by ranks that live."""
    rig.replace_dead_rank()
    rig.update()
    rig.check_healthy()
