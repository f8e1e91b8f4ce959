"""A few things are remembered by what they were made of."""

from adapter.recent import Recent


def test_the_same_key_is_found_and_an_equal_one_too() -> None:
    recent = Recent[list[int], str]()
    key = [1, 2]
    recent.put(key, "a")
    assert recent.find(key) == "a"
    assert recent.find([1, 2]) == "a"
    assert recent.find([1]) is None


def test_a_key_that_is_the_same_object_is_not_compared() -> None:
    class Costly:
        def __eq__(self, other: object) -> bool:
            raise AssertionError

        __hash__ = None  # type: ignore[assignment]

    recent = Recent[Costly, int]()
    key = Costly()
    recent._entries = [(key, 1)]
    assert recent.find(key) == 1


def test_an_equal_key_is_known_as_itself_from_then_on() -> None:
    recent = Recent[list[int], str]()
    recent.put([1], "a")
    newer = [1]
    recent.find(newer)
    assert recent._entries[0][0] is newer


def test_the_one_that_was_not_used_for_longest_goes() -> None:
    recent = Recent[int, str](kept=2)
    recent.put(1, "a")
    recent.put(2, "b")
    recent.find(1)
    recent.put(3, "c")
    assert [recent.find(key) for key in (1, 2, 3)] == ["a", None, "c"]


def test_a_key_has_one_value_and_nothing_is_left_after_clear() -> None:
    recent = Recent[int, str](kept=2)
    recent.put(1, "a")
    recent.put(1, "b")
    assert recent.find(1) == "b"
    assert len(recent._entries) == 1
    recent.clear()
    assert recent.find(1) is None
