"""This host's address, as the engines of a fleet are told it."""

import pytest

from adapter.fleet.group import address_towards


@pytest.mark.parametrize("target", ["unix:/run/s.sock", "unix:///run/s.sock", "50051"])
def test_a_sidecar_on_this_host_reaches_it_by_loopback(target: str) -> None:
    assert address_towards(target) == "127.0.0.1"


@pytest.mark.parametrize(
    ("target", "address"), [("127.0.0.1:50051", "127.0.0.1"), ("127.9.9.9:1", "127.0.0.1"), ("[::1]:50051", "::1")]
)
def test_the_way_to_a_sidecar_shows_the_address(target: str, address: str) -> None:
    assert address_towards(target) == address


def test_a_name_is_as_good_as_a_number() -> None:
    assert address_towards("localhost:50051") in ("127.0.0.1", "::1")


def test_a_name_that_does_not_exist_is_a_mistake_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"nobody.invalid:50051 shows no way .*: say Fleet\(address=\.\.\.\)"):
        address_towards("nobody.invalid:50051")
