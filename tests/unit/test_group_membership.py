"""The one group of an engine: joined, left, lost, and forgotten with the life of the engine that was in it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sidecar.errors import EngineError, EngineLost, EngineRefused, EngineTimeout, EngineUnreachable, Reason
from sidecar.errors import UnsuitableEngine as Unsuitable
from sidecar.group import Group
from sidecar.membership import Membership


def group(name: str) -> Group:
    return Group(name=name, master_address="trainer", master_port=29500, rank_offset=1, world_size=2, backend="gloo")


@dataclass
class Engine:
    """An engine that is in groups, and does not answer as planned."""

    epoch: int = 1
    groups: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    fails: EngineError | None = None
    """The next step."""
    carried_out: bool = False
    """Whether it was, all the same."""
    no_store: bool = False
    """Whether trainers cannot be reached."""
    meanwhile: Callable[[], None] = lambda: None
    """What happens while it joins."""

    def attach(self) -> None:
        self.steps.append("attach")

    async def reach(self, group: Group) -> None:
        if self.no_store:
            raise Unsuitable(Reason.GROUP_UNREACHABLE, "no trainer there")

    async def join_group(self, group: Group) -> None:
        self._step(f"join {group.name}", lambda: self.groups.append(group.name))
        self.meanwhile()

    async def leave_group(self, name: str) -> bool:
        was_joined = name in self.groups
        self._step(f"leave {name}", lambda: self.groups.remove(name) if was_joined else None)
        return was_joined

    def _step(self, what: str, act: Callable[[], None]) -> None:
        self.steps.append(what)
        failure, self.fails = self.fails, None
        if failure is None or self.carried_out:
            act()
        if failure is not None:
            raise failure


class Here:
    """One engine, its membership, and what was said when it was lost."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.lost: list[str] = []
        self.membership = Membership(self.engine, self.lost.append)

    def joins(self, name: str) -> None:
        asyncio.run(self.membership.join(group(name)))

    def leaves(self) -> bool:
        return asyncio.run(self.membership.leave())

    def leaves_named(self, name: str) -> bool:
        return asyncio.run(self.membership.leave_named(name))

    @property
    def name(self) -> str:
        return self.membership.group.name if self.membership.group else ""


def raises(kind: type[EngineError], act: Callable[[], object]) -> EngineError:
    with pytest.raises(kind) as raised:
        act()
    return raised.value


def test_a_group_is_that_of_the_engine_from_its_joining_to_its_leaving() -> None:
    here = Here()
    assert (here.name, here.leaves()) == ("", False)
    here.joins("a")
    assert here.name == "a"
    here.membership.check_joined("a")
    assert (here.leaves(), here.name, here.engine.groups) == (True, "", [])
    assert here.engine.steps == ["attach", "join a", "leave a"]


def test_another_group_is_joined_after_the_first_is_left() -> None:
    here = Here()
    here.joins("a")
    here.joins("b")
    assert here.engine.steps == ["attach", "join a", "attach", "leave a", "join b"]
    assert (here.name, here.engine.groups) == ("b", ["b"])


def test_a_group_whose_store_cannot_be_reached_is_not_joined_and_the_one_before_stays() -> None:
    here = Here()
    here.joins("a")
    here.engine.no_store = True
    with pytest.raises(Unsuitable, match="no trainer there"):
        here.joins("b")
    assert here.engine.steps == ["attach", "join a", "attach"]
    assert (here.name, here.lost) == ("a", [])


@pytest.mark.parametrize(("joined", "there"), [("", "is in no group"), ("a", "is in group 'a'")])
def test_a_group_that_the_engine_is_not_in_is_unknown(joined: str, there: str) -> None:
    here = Here()
    if joined:
        here.joins(joined)
    with pytest.raises(Unsuitable, match=f"the engine {there}, not in 'b'; call InitWeightsUpdateGroup") as raised:
        here.membership.check_joined("b")
    assert raised.value.reason is Reason.GROUP_UNKNOWN


def test_a_group_goes_with_the_life_of_the_engine_and_is_not_left_by_the_next() -> None:
    here = Here()
    here.joins("a")
    here.engine.epoch, here.engine.groups = 2, []
    assert here.name == ""
    with pytest.raises(Unsuitable, match="in no group"):
        here.membership.check_joined("a")
    here.joins("b")
    assert "leave a" not in here.engine.steps
    assert here.name == "b"


def test_an_engine_that_is_restarted_while_it_joins_is_in_no_group() -> None:
    """The answer was the old one's."""
    here = Here()
    here.engine.meanwhile = lambda: setattr(here.engine, "epoch", 2)
    here.joins("a")
    assert here.name == ""


def test_a_refused_joining_leaves_the_engine_in_no_group() -> None:
    here = Here()
    here.joins("a")
    here.engine.meanwhile = lambda: None
    refused = EngineRefused(Reason.ENGINE_REFUSED, "no")

    def second() -> None:
        here.leaves()
        here.engine.fails = refused
        here.joins("b")

    assert raises(EngineRefused, second) is refused
    assert (here.name, here.lost) == ("", [])
    assert here.leaves() is False
    assert here.engine.steps[-1] == "join b", "there is nothing to leave"


@pytest.mark.parametrize("kind", [EngineLost, EngineTimeout])
def test_an_engine_that_does_not_answer_while_it_joins_is_lost_and_leaves_before_the_next(
    kind: type[EngineLost],
) -> None:
    here = Here()
    here.engine.fails, here.engine.carried_out = kind(Reason.ENGINE_LOST, "no answer"), True
    raises(kind, lambda: here.joins("a"))
    assert here.name == ""
    (said,) = here.lost
    assert said.startswith("the engine did not answer while it joined group 'a' of trainer: its scheduler may wait")
    here.joins("b")
    assert here.engine.steps == ["attach", "join a", "attach", "leave a", "join b"]
    assert here.engine.groups == ["b"]


def test_what_could_not_be_left_is_left_before_the_next_is_joined() -> None:
    here = Here()
    here.joins("a")
    here.engine.fails = EngineTimeout(Reason.ENGINE_LOST, "no answer")
    assert here.leaves() is True
    assert (here.name, here.engine.groups) == ("", ["a"])
    here.joins("b")
    assert here.engine.groups == ["b"]
    assert here.engine.steps[-2:] == ["leave a", "join b"]


def test_what_cannot_be_left_stands_in_the_way_of_no_other() -> None:
    here = Here()
    here.joins("a")
    here.engine.fails = EngineUnreachable(Reason.ENGINE_UNREACHABLE, "gone")
    here.joins("b")
    assert (here.name, here.lost) == ("b", [])


def test_an_engine_that_is_gone_joins_nothing() -> None:
    here = Here()

    def gone() -> None:
        raise EngineUnreachable(Reason.ENGINE_UNREACHABLE, "gone")

    here.engine.attach = gone  # type: ignore[method-assign]
    raises(EngineUnreachable, lambda: here.joins("a"))
    assert here.engine.steps == []


def test_a_group_that_a_sidecar_before_this_one_had_joined_is_left_by_its_name() -> None:
    here = Here()
    here.engine.groups = ["of before"]
    assert here.leaves_named("of before")
    assert here.engine.groups == []
    assert not here.leaves_named("of before")


def test_leaving_by_name_is_leaving() -> None:
    here = Here()
    here.joins("one")
    assert not here.leaves_named("another")
    assert here.name == "one"
    assert here.leaves_named("one")
    assert (here.name, here.engine.groups) == ("", [])


def test_a_group_of_before_that_cannot_be_left_is_told() -> None:
    here = Here()
    here.engine.fails = EngineTimeout(Reason.ENGINE_TIMEOUT, "busy")
    raises(EngineTimeout, lambda: here.leaves_named("of before"))
