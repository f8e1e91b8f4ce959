"""Every cell of the matrix, on a scripted engine under traffic."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest

from sidecar.config import Timeouts
from tests.faults import matrix, verdict
from tests.faults.matrix import Cell, Expected, What, When, Who
from tests.faults.rig import Rig
from tests.faults.scene import PATHS, QUIET, play

SESSIONS, NO_SESSIONS = "0.5.23", "0.5.20"
WAITS_S = {"collect": 3.0, "bucket": 3.5}
CALLS_S = {name: 3.0 for name in Timeouts.__dataclass_fields__ if name not in WAITS_S}
PATIENT = WAITS_S | CALLS_S
IMPATIENT = WAITS_S | dict.fromkeys(CALLS_S, 0.6)
"""For an engine that answers nothing any more, several times over."""
QUICK = {(Who.RANK, What.KILLED), (Who.ENGINE, What.CUT), (Who.ENGINE, What.LOST)}
"""What is played with the other tests, in every phase."""
ALSO_QUICK = {
    "rank-stopped-collect",
    "rank-slow-between",
    "rank-cut-begin",
    "rank-reply-lost-load-first",
    "one-call-rank-killed-load-last",
    "sidecar-killed-pause",
    "sidecar-killed-between",
    "sidecar-stopped-load-first",
    "sidecar-slow-end",
    "sidecar-cut-between",
    "engine-killed-load-first",
    "engine-slow-load-last",
}
LOADS = (When.LOAD_FIRST, When.LOAD_LAST)
OLDER = {(Who.RANK, What.KILLED), (Who.SIDECAR, What.KILLED)} | {(Who.ENGINE, what) for what in What}
"""Whose loads are played on a release without sessions as well, where fewer calls tell what became of them."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a cell is played on."""

    release: str
    patient: bool
    """Whether the sidecar's time-outs are long enough for a busy machine."""

    @property
    def args(self) -> tuple[str, ...]:
        """Of the sidecar."""
        seconds = PATIENT if self.patient else IMPATIENT
        return tuple(word for name, value in seconds.items() for word in (f"--{name}-timeout", f"{value:g}"))


def _params() -> list[object]:
    """All cells, those of one setting one after the other."""
    cells = [cell for cell in matrix.cells() if isinstance(cell.expected, Expected)]
    older = [cell for cell in cells if cell.when in LOADS and (cell.who, cell.what) in OLDER]
    played = [(_setting(SESSIONS, cell), cell) for cell in cells] + [
        (_setting(NO_SESSIONS, cell), cell) for cell in older
    ]
    return [_param(*one) for one in sorted(played, key=lambda one: (one[0].release, one[0].patient), reverse=True)]


def _setting(release: str, cell: Cell) -> Setting:
    return Setting(release, patient=(cell.who, cell.what) != (Who.ENGINE, What.STOPPED))


def _param(setting: Setting, cell: Cell) -> object:
    newest = setting.release == SESSIONS
    quick = newest and not cell.unopened and ((cell.who, cell.what) in QUICK or str(cell) in ALSO_QUICK)
    name = str(cell) if newest else f"{cell}-{setting.release}"
    return pytest.param(setting, cell, id=name, marks=() if quick else pytest.mark.faults)


class Rigs:
    """The rig in use, or another one where a cell needs one or has left it broken."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._rig: Rig | None = None
        self._healthy: Setting | None = None

    def borrow(self, setting: Setting) -> Rig:
        """A healthy one; until it is given back it counts as broken."""
        if self._rig is None or self._healthy != setting:
            self.close()
            self._rig = Rig(self._folders.mktemp("faults"), setting.release, setting.args)
            self._rig.update()
            self._rig.check_healthy()
        self._healthy = None
        return self._rig

    def give_back(self, setting: Setting) -> None:
        """Healthy again."""
        self._healthy = setting

    def close(self) -> None:
        rig, self._rig = self._rig, None
        if rig is not None:
            rig.close()


@pytest.fixture(scope="session")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rigs]:
    with closing(Rigs(tmp_path_factory)) as rigs:
        yield rigs


@pytest.mark.parametrize(("setting", "cell"), _params())
def test_a_cell_ends_as_the_matrix_says_and_is_healed_as_it_says(rigs: Rigs, setting: Setting, cell: Cell) -> None:
    assert isinstance(cell.expected, Expected)
    rig = rigs.borrow(setting)
    seen = play(rig, cell)
    verdict.check(rig, cell.expected, seen)
    verdict.heal(rig, cell, cell.expected)
    rigs.give_back(setting)


def test_the_quick_cells_are_in_the_matrix() -> None:
    assert {str(cell) for cell in matrix.cells()} >= ALSO_QUICK


def test_every_phase_with_a_request_is_reached_by_that_request() -> None:
    assert {*PATHS, *QUIET} == set(When)
