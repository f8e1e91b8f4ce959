"""What weights the engine holds, over its lives and the sidecar's."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sidecar import refusals
from sidecar.engine.info import EngineInfo, parse
from sidecar.errors import SyncError
from sidecar.header import Header
from sidecar.journal import Entry, Journal
from sidecar.manifest import Manifest
from sidecar.served import ServedWeights
from sidecar.update import Update, UpdateState


@dataclass
class Engine:
    """A server's life, as the watch sees it."""

    info: EngineInfo | None = None
    epoch: int = 0

    def start(self, seed: str, process: str = "") -> None:
        self.info = replace(parse({"version": "0.5.23", "random_seed": seed}), process=process)
        self.epoch += 1


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "s.sock.journal")


def update(state: UpdateState) -> Update:
    header = Header(update_id="u", weight_version="7", rank=0, tp_size=1)
    ended = Update(header, Manifest(()), "digest", state=UpdateState.APPLYING)
    error = None if state is UpdateState.COMMITTED else refusals.aborted_by(ended, 0, "a test")
    ended.end(state, error)
    return ended


def unsynced(served: ServedWeights) -> bool:
    """Asked anew each time: mypy takes a property for a constant."""
    return served.unsynced


def fenced(served: ServedWeights) -> str:
    return served.fenced


def stays_held(served: ServedWeights) -> bool:
    return served.stays_held


def left_over(served: ServedWeights) -> Entry | None:
    return served.recoverable


def dirt(served: ServedWeights) -> SyncError | None:
    return served.dirty


def test_the_first_server_is_in_step_and_a_restarted_one_is_not(journal: Journal) -> None:
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    engine.start("1")
    assert not unsynced(served)
    engine.start("2")
    assert unsynced(served)
    served.ended(update(UpdateState.COMMITTED))
    assert not unsynced(served)


def test_a_checkpoint_that_is_accepted_is_in_step(journal: Journal) -> None:
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=True)
    engine.start("1")
    engine.start("2")
    assert not unsynced(served)


def test_a_failed_update_is_dirt_until_a_complete_one_or_another_server(journal: Journal) -> None:
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    engine.start("1")
    failed = update(UpdateState.FAILED)
    served.touching(failed, writing=True)
    served.ended(failed)
    assert dirt(served) is failed.error
    served.ended(update(UpdateState.ABORTED))
    assert dirt(served) is failed.error, "an update that never touched the engine heals nothing"
    assert journal.unfinished() is not None
    served.ended(update(UpdateState.COMMITTED))
    assert dirt(served) is None
    assert journal.unfinished() is None
    served.ended(failed)
    engine.start("2")
    assert dirt(served) is None


def test_a_predecessors_unfinished_update_is_dirt_on_the_server_that_it_touched(journal: Journal) -> None:
    journal.begin(Entry(update_id="left", weight_version="7", engine_seed="1"))
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    served.engine_seen()
    assert dirt(served) is None, "the engine was not seen yet"
    engine.start("1")
    served.engine_seen()
    left = dirt(served)
    assert left is not None
    assert "'left'" in left.message
    assert left_over(served) is not None
    served.recovered(whole=False)
    assert left_over(served) is None
    assert dirt(served) is left
    assert journal.unfinished() is not None


def test_a_predecessors_update_that_wrote_nothing_is_dirt_until_it_was_undone(journal: Journal) -> None:
    engine = Engine()
    engine.start("1")
    before = ServedWeights(engine, journal, accept_checkpoint=False)
    before.touching(update(UpdateState.COMMITTED), writing=False)
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    served.engine_seen()
    assert dirt(served) is not None
    assert served.recoverable is not None
    assert not served.recoverable.written
    served.recovered(whole=True)
    assert dirt(served) is None
    assert journal.unfinished() is None


def test_pausing_a_dirty_engine_again_does_not_make_it_whole(journal: Journal) -> None:
    engine = Engine()
    engine.start("1")
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    served.ended(update(UpdateState.FAILED))
    served.touching(update(UpdateState.ABORTED), writing=False)
    left = journal.unfinished()
    assert left is not None
    assert left.written


def test_a_predecessors_journal_means_nothing_to_a_server_started_since(journal: Journal) -> None:
    journal.begin(Entry(update_id="left", weight_version="7", engine_seed="1"))
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    engine.start("2")
    served.engine_seen()
    assert dirt(served) is None
    assert served.recoverable is None
    assert journal.unfinished() is None


@pytest.mark.parametrize(("process", "is_dirty"), [("7/100", True), ("8/200", False), ("", True)])
def test_a_predecessors_journal_is_about_the_process_that_it_touched(
    journal: Journal, process: str, is_dirty: bool
) -> None:
    """Where the seed was set, another process tells that the server was started since."""
    engine = Engine()
    before = ServedWeights(engine, journal, accept_checkpoint=False)
    engine.start("1", "7/100")
    before.touching(update(UpdateState.FAILED), writing=True)
    successor = Engine()
    served = ServedWeights(successor, journal, accept_checkpoint=False)
    successor.start("1", process)
    served.engine_seen()
    assert (dirt(served) is not None, left_over(served) is not None) == (is_dirty, is_dirty)
    assert (journal.unfinished() is not None) is is_dirty


def test_an_engine_that_was_taken_out_of_service_is_in_again_with_a_complete_update(journal: Journal) -> None:
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    engine.start("1")
    assert fenced(served) == ""
    served.fence("others went on")
    assert (fenced(served), stays_held(served), unsynced(served), dirt(served)) == (
        "others went on",
        False,
        False,
        None,
    )
    served.ended(update(UpdateState.ABORTED))
    assert fenced(served) == "others went on"
    served.fence("and for another reason")
    assert fenced(served) == "and for another reason"
    served.ended(update(UpdateState.COMMITTED))
    assert fenced(served) == ""


def test_an_engine_that_is_out_of_service_is_out_as_long_as_it_lives(journal: Journal) -> None:
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    engine.start("1")
    served.fence("others went on", held=True)
    engine.start("2")
    assert (fenced(served), stays_held(served), unsynced(served)) == ("", False, True)


def test_generation_stays_held_while_weights_are_mixed_or_somebody_wants_it_so(journal: Journal) -> None:
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False)
    engine.start("1")
    assert not stays_held(served)
    served.fence("others went on", held=True)
    assert stays_held(served)
    served.fence("the engine did not answer while it joined")
    assert stays_held(served), "a second reason lets nothing go on"
    served.touching(update(UpdateState.ABORTED), writing=False)
    left = journal.unfinished()
    assert left is not None
    assert left.written, "a successor must not let it go on either"
    served.ended(update(UpdateState.COMMITTED))
    assert not stays_held(served)
    served.ended(update(UpdateState.FAILED))
    assert stays_held(served)
    served.fence("others went on")
    served.ended(update(UpdateState.COMMITTED))
    assert not stays_held(served)


def test_where_an_update_is_required_no_server_is_in_step_before_one(journal: Journal) -> None:
    engine = Engine()
    served = ServedWeights(engine, journal, accept_checkpoint=False, require_update=True)
    engine.start("1")
    assert unsynced(served)
    served.ended(update(UpdateState.ABORTED))
    assert unsynced(served)
    served.ended(update(UpdateState.COMMITTED))
    assert not unsynced(served)
    engine.start("2")
    assert unsynced(served)
