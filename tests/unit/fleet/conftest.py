"""Members that are asked nothing."""

from collections.abc import Iterator

import pytest

from adapter.credentials import NO_CREDENTIALS
from adapter.fleet.member import Member

Three = tuple[Member, Member, Member]


@pytest.fixture
def three() -> Iterator[Three]:
    """Nobody is called: a channel is opened by its first call."""
    a, b, c = (Member(f"{name}:1", NO_CREDENTIALS) for name in "abc")
    yield a, b, c
    for member in (a, b, c):
        member.close()
