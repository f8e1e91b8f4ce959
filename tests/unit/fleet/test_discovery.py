"""Who belongs to a fleet: by list, by name, by question."""

import ipaddress

import pytest

from adapter.fleet import Asked, Dns, Fleet, Listed


def test_a_list_is_told_in_its_order_each_target_once_and_any_target_is_taken() -> None:
    targets = ["unix:/s.sock", "host-2:50051", "[::1]:1", "host-1:50051", "host-2:50051"]
    assert list(Listed(iter(targets)).targets()) == ["unix:/s.sock", "host-2:50051", "[::1]:1", "host-1:50051"]


def test_a_list_of_nobody_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="a fleet needs at least one sidecar"):
        Fleet([])


def test_a_name_gives_every_address_with_the_port_sorted() -> None:
    found = list(Dns("localhost", 50051).targets())
    assert found
    assert found == sorted(set(found))
    for target in found:
        host, _, port = target.rpartition(":")
        assert port == "50051"
        assert ipaddress.ip_address(host.strip("[]")).is_loopback


def test_a_number_stays_itself_and_one_of_version_6_is_bracketed() -> None:
    assert list(Dns("127.0.0.1", 7).targets()) == ["127.0.0.1:7"]
    assert list(Dns("::1", 7).targets()) == ["[::1]:7"]


def test_a_name_that_does_not_exist_has_no_members_now_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert list(Dns("nobody.invalid", 50051).targets()) == []
    assert "nobody.invalid has no address now" in caplog.text


def test_a_function_is_asked_anew_each_time() -> None:
    members = ["a:1"]
    asked = Asked(lambda: iter(members))
    assert list(asked.targets()) == ["a:1"]
    members += ["b:1", "a:1"]
    assert list(asked.targets()) == ["a:1", "b:1"]
