"""The word that a sidecar leaves to its successor."""

from pathlib import Path

from sidecar.journal import Entry, Journal

ENTRY = Entry(update_id="u", weight_version="7", engine_seed="42")


def test_what_was_begun_is_found_until_it_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "s.sock.journal"
    assert Journal(path).unfinished() is None
    Journal(path).begin(ENTRY)
    assert Journal(path).unfinished() == ENTRY
    Journal(path).clear()
    Journal(path).clear()
    assert Journal(path).unfinished() is None
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_read_still_says_that_an_update_was_in_hand(tmp_path: Path) -> None:
    path = tmp_path / "s.sock.journal"
    for text in ("", "{", "[]", '{"update_id": "u"}'):
        path.write_text(text)
        assert Journal(path).unfinished() == Entry(update_id="unknown", weight_version="unknown", engine_seed="")


def test_without_a_path_nothing_is_kept() -> None:
    journal = Journal(None)
    journal.begin(ENTRY)
    assert journal.unfinished() is None
    journal.clear()
