"""The word that a sidecar leaves to its successor."""

import json
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("written", "now", "is_about"),
    [
        (("42", "7/100"), ("42", "7/100"), True),
        (("42", "7/100"), ("43", "7/100"), False),
        (("42", "7/100"), ("42", "7/101"), False),
        (("42", "7/100"), ("42", "8/100"), False),
        (("42", ""), ("42", "7/100"), True),
        (("42", "7/100"), ("42", ""), True),
        (("42", ""), ("43", ""), False),
        (("", "7/100"), ("42", "7/100"), True),
        (("", "7/100"), ("42", "8/100"), False),
        (("", ""), ("42", "7/100"), True),
    ],
)
def test_an_entry_is_about_the_server_that_it_names_and_in_doubt_about_this_one(
    written: tuple[str, str], now: tuple[str, str], is_about: bool
) -> None:
    seed, process = written
    entry = Entry(update_id="u", weight_version="7", engine_seed=seed, engine_process=process)
    assert entry.is_about(*now) is is_about


def test_an_entry_of_a_sidecar_that_saw_no_processes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.sock.journal"
    path.write_text(json.dumps({"update_id": "u", "weight_version": "7", "engine_seed": "42"}))
    assert Journal(path).unfinished() == ENTRY
