"""The log is enough to know what the engine holds."""

import json
from typing import Any

import pytest

from tests.soak.prediction import AT_FIRST, DIRTY, READY, UNSYNCED, Expected, content_digest, predict

NAMES = ("a", "b", "c")


def update(version: str, outcome: str, seed: int, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    fields = {"step": int(version), "version": version, "outcome": outcome, "seed": seed, "names": names}
    return {"event": "update", "whole": names == NAMES, **fields}


def predicted(*events: dict[str, Any]) -> Expected:
    return predict(json.dumps(event) for event in events)


def test_an_empty_log_predicts_the_server_as_it_was_started() -> None:
    assert predicted({"event": "begin", "seed": 1}) == AT_FIRST


def test_a_committed_update_is_served() -> None:
    assert predicted(update("1", "COMMITTED", 7)) == Expected("1", {"a": 7, "b": 7, "c": 7}, READY)


def test_a_part_replaces_only_what_it_carries() -> None:
    expected = predicted(update("1", "COMMITTED", 7), update("2", "COMMITTED", 8, ("b",)))
    assert expected == Expected("2", {"a": 7, "b": 8, "c": 7}, READY)


def test_an_aborted_update_leaves_everything_as_it_was() -> None:
    assert predicted(update("1", "COMMITTED", 7), update("2", "ABORTED", 8)).version == "1"


def test_a_failed_update_leaves_no_version_and_no_known_content() -> None:
    assert predicted(update("1", "COMMITTED", 7), update("2", "FAILED", 8)) == Expected("", None, DIRTY)


def test_an_aborted_update_does_not_heal() -> None:
    assert predicted(update("1", "FAILED", 7), update("2", "ABORTED", 8)).state == DIRTY


def test_a_whole_update_heals() -> None:
    expected = predicted(update("1", "FAILED", 7), update("2", "COMMITTED", 8))
    assert expected == Expected("2", {"a": 8, "b": 8, "c": 8}, READY)


def test_a_server_that_was_started_again_serves_its_checkpoint() -> None:
    restarted = {"event": "engine", "version": "default"}
    assert predicted(update("1", "COMMITTED", 7), restarted) == Expected("default", None, UNSYNCED)


def test_a_part_after_a_failure_is_a_mistake_of_the_soak() -> None:
    with pytest.raises(ValueError, match="step 2"):
        predicted(update("1", "FAILED", 7), update("2", "COMMITTED", 8, ("b",)))


def test_samples_and_other_lines_change_nothing() -> None:
    other = [{"event": event} for event in ("sample", "sidecar", "rank")]
    assert predicted(update("1", "COMMITTED", 7), *other) == predicted(update("1", "COMMITTED", 7))


def test_a_digest_names_a_content_whatever_its_order() -> None:
    assert content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})
    assert content_digest({"a": 1, "b": 2}) != content_digest({"a": 2, "b": 1})
