"""Whether a cell ended as the matrix says, and whether it can be healed as the matrix says.

Invariant: a rig that ``heal`` returns from is as ``Rig`` describes it between two cells.
"""

import time

from sidecar.v1 import weight_sync_pb2 as pb
from tests.faults.matrix import Cell, Ending, Expected, Visible
from tests.faults.rig import Rig, wait_until
from tests.faults.scene import Seen

NO_HANG_S = 15.0
"""The longest that any cell's calls may take, all deadlines of the rig's sidecar together."""
WATCH_S = 0.15
"""How long generation is watched before anything is healed."""
UNDER_WAY_S = 0.05
"""For an answer that was given just before generation was held."""
OUTCOMES = {
    Ending.COMMITTED: pb.UPDATE_STATE_COMMITTED,
    Ending.ABORTED: pb.UPDATE_STATE_ABORTED,
    Ending.DIRTY: pb.UPDATE_STATE_FAILED,
    Ending.ENGINE_GONE: pb.UPDATE_STATE_ABORTED,
}
FROM_DISK = ("rank-killed-between", "sidecar-killed-load-first", "engine-cut-load-last")
"""Cells that are healed from disk first."""


def check(rig: Rig, expected: Expected, seen: Seen) -> None:
    """What clients, generation and an operator see before anything is healed."""
    before = rig.version
    if expected.ending in (Ending.SUCCESSOR_READY, Ending.SUCCESSOR_DIRTY):
        rig.start_sidecar()
    for saw, may in zip(seen.sees, expected.sees, strict=True):
        assert saw in may.split("|"), f"calls ended with {seen.sees}, not {expected.sees}"
    assert seen.ended - seen.started < NO_HANG_S
    wait_until(lambda: rig.state() in expected.state.split("|"), f"state {expected.state}")
    _check_outcome(rig, expected, seen)
    if rig.engine.alive:
        wait_until(lambda: rig.engine.paused == expected.paused, f"paused: {expected.paused}")
    _check_generation(rig, expected, seen, before)
    if expected.ending is Ending.COMMITTED:
        rig.version = seen.job.version


def _check_outcome(rig: Rig, expected: Expected, seen: Seen) -> None:
    if (state := OUTCOMES.get(expected.ending)) is not None:
        outcome = rig.outcome(seen.job.update_id)
        assert pb.UpdateState.Name(outcome.state) == pb.UpdateState.Name(state), outcome.error
    status = rig.status()
    if status.state == pb.SIDECAR_STATE_DIRTY:
        assert status.weight_version == ""
        assert status.reason


def _check_generation(rig: Rig, expected: Expected, seen: Seen, before: str) -> None:
    """``before``: the version that was served when the fault came."""
    held_since = seen.ended if expected.visible is Visible.OLD else time.monotonic() + UNDER_WAY_S
    time.sleep(WATCH_S)
    visible = {before, seen.job.version} if expected.visible is Visible.OLD_THEN_NEW else {before}
    assert {answer.version for answer in rig.traffic.answers(seen.started)} <= visible
    if expected.paused:
        assert rig.traffic.answers(held_since) == []
    elif rig.engine.alive:
        assert rig.engine.loaded == rig.loaded_by(rig.engine.weight_version), "it generates with mixed weights"


def heal(rig: Rig, cell: Cell, expected: Expected) -> None:
    """Do what the matrix says, and see that all is well."""
    if expected.ending is Ending.ENGINE_GONE:
        rig.restart_engine()
    rig.replace_dead_ranks()
    if str(cell) in FROM_DISK:
        rig.update_from_disk()
    rig.update()
    rig.check_healthy()
