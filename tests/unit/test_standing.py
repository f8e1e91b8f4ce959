"""One word and one sentence for everything that the sidecar and its engine can be in."""

from dataclasses import dataclass, replace

import pytest

from sidecar import refusals
from sidecar.engine.info import EngineInfo, parse
from sidecar.header import Header
from sidecar.journal import Journal
from sidecar.manifest import Manifest
from sidecar.served import ServedWeights
from sidecar.standing import SidecarState, Standing
from sidecar.update import Update, UpdateState
from sidecar.v1 import weight_sync_pb2 as pb

INFO = parse({"version": "0.5.23", "random_seed": 1})
STARTED = "the engine has started and serves its checkpoint; send a complete update"
HELD = "the engine takes no requests (/ready): it starts, or was paused; a complete update lets it go on"


@dataclass
class Engine:
    """What the watch knows."""

    info: EngineInfo | None = INFO
    url: str = "http://engine"
    problem: str = ""
    held: bool = False
    weight_version: str = "6"
    epoch: int = 1


class Here:
    """One engine, what it serves, and the update in hand."""

    def __init__(self, *, require_update: bool = False) -> None:
        self.engine = Engine()
        self.served = ServedWeights(self.engine, Journal(None), accept_checkpoint=False, require_update=require_update)
        self.current: Update | None = None
        self.draining = False
        self._standing = Standing(self.engine, self.served, lambda: (self.current, self.draining))

    def fail(self) -> str:
        """An update broke off; its message."""
        failed = update(UpdateState.APPLYING)
        failed.end(UpdateState.FAILED, refusals.aborted_by(failed, 0, "a test"))
        self.served.ended(failed)
        assert failed.error is not None
        return failed.error.message

    def seen(self) -> tuple[SidecarState, bool, str, str]:
        """State, readiness, reason, version."""
        standing = self._standing
        return standing.state, standing.ready, standing.reason, standing.weight_version


def update(state: UpdateState) -> Update:
    return Update(Header(update_id="u", weight_version="7", rank=0, tp_size=1), Manifest(()), "digest", state=state)


def test_the_numbers_are_the_protocols() -> None:
    ours = {f"SIDECAR_STATE_{state.name}": state.value for state in SidecarState}
    assert ours == dict(list(pb.SidecarState.items())[1:])


def test_an_engine_that_serves_one_version_is_ready() -> None:
    assert Here().seen() == (SidecarState.READY, True, "", "6")


@pytest.mark.parametrize("problem", ["", "connection refused"])
def test_an_engine_that_cannot_be_reached(problem: str) -> None:
    here = Here()
    here.engine.info, here.engine.problem = None, problem
    reason = problem or "the engine at http://engine has not answered yet"
    assert here.seen() == (SidecarState.ENGINE_UNREACHABLE, False, reason, "")


def test_an_engine_that_broke_off_serves_no_one_version() -> None:
    here = Here()
    message = here.fail()
    assert here.seen() == (SidecarState.DIRTY, False, message, "")
    here.current = update(UpdateState.COLLECTING)
    assert here.seen() == (SidecarState.DIRTY, False, message, "")
    here.engine.held = True
    assert here.seen() == (SidecarState.DIRTY, False, message, "")


def test_an_engine_that_was_restarted_serves_its_checkpoint() -> None:
    here = Here()
    here.engine.epoch = 2
    assert here.seen() == (SidecarState.UNSYNCED, False, STARTED, "6")
    here.engine.held = True
    assert here.seen() == (SidecarState.UNSYNCED, False, STARTED, "6")


def test_an_engine_that_somebody_has_paused_is_not_ready_and_still_serves_one_version() -> None:
    here = Here()
    here.engine.held = True
    assert here.seen() == (SidecarState.PAUSED, False, HELD, "6")
    here.current = update(UpdateState.COLLECTING)
    assert here.seen() == (SidecarState.COLLECTING, False, HELD, "6")


def test_an_update_that_is_collected_costs_no_readiness() -> None:
    here = Here()
    here.current = update(UpdateState.COLLECTING)
    assert here.seen() == (SidecarState.COLLECTING, True, "", "6")


def test_an_update_that_is_applied_is_the_reason_why_the_engine_is_held() -> None:
    here = Here()
    here.current = update(UpdateState.APPLYING)
    assert here.seen() == (SidecarState.APPLYING, True, "", "6")
    here.engine.held = True
    assert here.seen() == (SidecarState.APPLYING, True, "", "6")


def test_a_sidecar_that_stops_is_draining_whatever_else_there_is() -> None:
    here = Here()
    here.draining = True
    assert here.seen()[:2] == (SidecarState.DRAINING, False)
    here.current = update(UpdateState.APPLYING)
    assert here.seen()[:2] == (SidecarState.DRAINING, False)
    here.engine.info = None
    assert here.seen()[:2] == (SidecarState.DRAINING, False)


def test_an_engine_that_cannot_be_updated_is_not_ready() -> None:
    here = Here()
    here.engine.info = replace(INFO, unsupported="pipeline parallelism")
    _, ready, reason, _ = here.seen()
    assert (ready, reason) == (False, "pipeline parallelism")


def test_an_engine_that_was_taken_out_of_service_is_not_ready_and_still_serves_one_version() -> None:
    here = Here()
    here.served.fence("others went on")
    reason = "out of service until a complete update: others went on"
    assert here.seen() == (SidecarState.FENCED, False, reason, "6")
    here.engine.held = True
    assert here.seen() == (SidecarState.FENCED, False, reason, "6")
    here.current = update(UpdateState.COLLECTING)
    assert here.seen() == (SidecarState.COLLECTING, False, reason, "6")
    here.current = update(UpdateState.APPLYING)
    assert here.seen() == (SidecarState.APPLYING, False, reason, "6")
    here.current = None
    message = here.fail()
    assert here.seen() == (SidecarState.DIRTY, False, message, "")


def test_an_engine_that_was_restarted_is_fenced_no_more() -> None:
    here = Here()
    here.served.fence("others went on")
    here.engine.epoch = 2
    assert here.seen() == (SidecarState.UNSYNCED, False, STARTED, "6")


def test_an_engine_that_needs_an_update_first_is_not_ready() -> None:
    assert Here(require_update=True).seen() == (SidecarState.UNSYNCED, False, STARTED, "6")
