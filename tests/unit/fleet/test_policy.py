"""How many engines a policy asks for."""

import pytest

from adapter.fleet import ALL_OR_NOTHING, BEST_EFFORT, quorum


@pytest.mark.parametrize("members", [1, 3, 256])
def test_all_or_nothing_needs_every_member(members: int) -> None:
    assert ALL_OR_NOTHING.needed(members) == members


@pytest.mark.parametrize("members", [0, 1, 3])
def test_best_effort_needs_one_engine_and_a_quorum_its_number_whatever_the_members(members: int) -> None:
    assert BEST_EFFORT.needed(members) == 1
    assert quorum(2).needed(members) == 2


@pytest.mark.parametrize("engines", [0, -1])
def test_a_quorum_of_nobody_is_a_mistake(engines: int) -> None:
    with pytest.raises(ValueError, match=f"a quorum is of 1 engine or more, not {engines}"):
        quorum(engines)


def test_a_policy_is_named_in_words_and_equal_to_another_of_its_kind() -> None:
    assert [str(policy) for policy in (ALL_OR_NOTHING, BEST_EFFORT, quorum(2))] == [
        "all-or-nothing",
        "best-effort",
        "quorum of 2",
    ]
    assert quorum(2) == quorum(2) != quorum(3)
