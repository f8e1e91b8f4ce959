"""Values between real gloo ranks, one process each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)

SIZE = 3
RANK_S = 90.0


def play(scene: str, folder: Path) -> list[list[Any]]:
    """What each rank said, line by line."""
    command = [sys.executable, "-m", "tests.integration.verl_exchange_rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(SIZE), str(folder / "store"), scene], stdout=subprocess.PIPE, text=True
        )
        for rank in range(SIZE)
    ]
    try:
        said = [rank.communicate(timeout=RANK_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [[json.loads(line) for line in text.splitlines()] for text in said]


def test_every_rank_gets_every_value_in_rank_order(tmp_path: Path) -> None:
    for said in play("gather", tmp_path):
        assert said == [
            [{"rank": rank, "text": "ü" * rank * 1000, "round": number} for rank in range(SIZE)] for number in range(3)
        ]


def test_a_failure_of_one_rank_is_raised_on_all_and_they_stay_in_step(tmp_path: Path) -> None:
    first, second, third = play("agree", tmp_path)
    for said in (first, second, third):
        assert (said[0], said[-1]) == ([0, 10, 20], ["still in step"] * SIZE)
    assert second[1:-1] == [
        ["LaunchError", "no GPU", {"a": "b"}],
        ["ValueError", "bad", None],
        ["FileNotFoundError", "gone", None],
        ["RuntimeError", "CUDA error", None],
    ]
    assert (
        first[1:-1]
        == third[1:-1]
        == [
            ["LaunchError", "rank 1: no GPU", {"a": "b"}],
            ["ValueError", "rank 1: bad", None],
            ["WeightSyncError", "rank 1: FileNotFoundError: gone", {}],
            ["WeightSyncError", "rank 1: RuntimeError: CUDA error", {}],
        ]
    )


def test_each_rank_keeps_its_own_result_unless_one_of_them_fails(tmp_path: Path) -> None:
    for rank, said in enumerate(play("together", tmp_path)):
        mistake = ["ValueError", "bad" if rank == 1 else "rank 1: bad", None]
        assert said == [[rank], mistake, ["in step"] * SIZE]


def test_rank_0_asks_and_all_get_its_answer_or_its_error(tmp_path: Path) -> None:
    first, second, third = play("ask", tmp_path)
    for said in (first, second, third):
        assert said[0] == {"asked by": 0}
        assert said[1:3] == [["WeightSyncError", "SGLang said no", {}], ["ValueError", "bad", None]]
        assert said[4:] == ["late", 3_000_000]
    assert first[3] == ["KeyError", "'a defect'", None]
    assert second[3] == third[3] == ["WeightSyncError", "KeyError: 'a defect'", {}]


def test_ctrl_c_on_rank_0_is_told_to_those_who_wait_for_its_answer(tmp_path: Path) -> None:
    first, *others = play("interrupt", tmp_path)
    assert first == ["interrupted", ["in step"] * SIZE]
    for said in others:
        assert said == [["WeightSyncError", "KeyboardInterrupt", {}], ["in step"] * SIZE]


def test_what_is_released_is_what_rank_0_has_released(tmp_path: Path) -> None:
    first, *others = play("memory", tmp_path)
    assert all(said == first for said in others)
    refused, unknown, release, resume = first
    assert (refused[0][0], refused[1]) == ("WeightSyncError", [])
    assert (unknown[0][0], unknown[1]) == ("ValueError", [])
    assert release == [None, ["kv_cache"]]
    assert (resume[0][0], resume[1]) == ("WeightSyncError", ["kv_cache"])


def test_a_stream_goes_through_all_ranks_in_step_and_ends_for_all(tmp_path: Path) -> None:
    for said in play("stream", tmp_path):
        assert said[0] == [None, 1, 2, 3, 4]
        assert said[1] == ["WeightSyncError", "broke off", {}]
        assert said[2] == [None, 1]
        assert said[3] == [[0, 0, 0], [], []], "rank 0's generators are all closed, the last one early"


def test_a_rank_that_dies_is_an_error_for_the_others(tmp_path: Path) -> None:
    first, second, third = play("death", tmp_path)
    assert third == []
    for ((kind, message, _),) in (first, second):
        assert kind == "WeightSyncError"
        assert message.startswith("another rank of the mesh is gone, or its process group is broken: ")


def test_a_group_that_does_not_begin_with_the_worlds_rank_0(tmp_path: Path) -> None:
    assert play("subgroup", tmp_path) == [[], [[[0, 1], 1]], [[[0, 1], 1]]]
