"""Settings are checked before anything is opened."""

import re
from pathlib import Path

import pytest

from sidecar.config import ServeConfig, TcpAddress, Timeouts, UnixAddress, parse_address


def test_a_socket_path_is_an_address(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/sidecar.sock")
    assert address == UnixAddress(tmp_path / "sidecar.sock")
    assert str(address) == f"unix:{tmp_path}/sidecar.sock"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051),
        ("127.8.8.8:0", "127.8.8.8", 0),
        ("localhost:1", "localhost", 1),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_loopback_hosts_are_addresses(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == TcpAddress(host, port)
    assert str(address) == text


@pytest.mark.parametrize("text", ["0.0.0.0:1", "10.0.0.1:1", "example.com:1", "[::]:1"])
def test_an_address_that_others_could_reach_is_refused_unless_that_is_what_is_wanted(text: str) -> None:
    listen = parse_address(text)
    said = rf"'{re.escape(text)}' is not a loopback address: it needs TLS .* or say --insecure if"
    with pytest.raises(ValueError, match=said):
        ServeConfig(engine_url="http://h:1", listen=listen)
    config = ServeConfig(engine_url="http://h:1", listen=listen, insecure=True)
    assert config.is_exposed
    assert str(config.listen) == text


@pytest.mark.parametrize("text", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/s.sock"])
def test_an_address_of_this_host_alone_is_exposed_to_nobody(text: str) -> None:
    for insecure in (False, True):
        assert not ServeConfig(engine_url="http://h:1", listen=parse_address(text), insecure=insecure).is_exposed


@pytest.mark.parametrize("text", ["", "nothing", ":1", "localhost", "localhost:", "localhost:x", "localhost:65536"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is neither unix:/path\.sock nor host:port"):
        parse_address(text)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("sidecar.sock", "must be an absolute path"),
        ("", "must be an absolute path"),
        ("/nowhere/at/all/s.sock", "the folder does not exist"),
        ("/tmp/" + "s" * 103, "is longer than the 107 bytes that Linux allows"),
    ],
)
def test_a_socket_path_that_cannot_work_is_refused(path: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_address(f"unix:{path}")


def test_the_longest_socket_path_is_accepted() -> None:
    parse_address("unix:/tmp/" + "s" * 102)


@pytest.mark.parametrize("url", ["", "127.0.0.1:30000", "ftp://host", "http://", "/path"])
def test_an_engine_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not of the form http://host:port"):
        ServeConfig(engine_url=url, listen=TcpAddress("127.0.0.1", 0))


@pytest.mark.parametrize("name", Timeouts.__dataclass_fields__)
@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_timeout_that_is_not_positive_is_refused_by_name(name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"timeout {name} must be more than 0 s"):
        Timeouts(**{name: seconds})


def test_a_call_without_a_deadline_waits_for_all_phases_together() -> None:
    assert Timeouts().total == sum(getattr(Timeouts(), name) for name in Timeouts.__dataclass_fields__)


def test_the_journal_lies_beside_the_socket_and_on_tcp_where_it_was_set(tmp_path: Path) -> None:
    unix, tcp = UnixAddress(tmp_path / "s.sock"), TcpAddress("127.0.0.1", 1)
    assert ServeConfig(engine_url="http://h:1", listen=unix).journal == tmp_path / "s.sock.journal"
    assert ServeConfig(engine_url="http://h:1", listen=tcp).journal is None
    chosen = tmp_path / "chosen"
    for address in (unix, tcp):
        assert ServeConfig(engine_url="http://h:1", listen=address, journal_path=chosen).journal == chosen
    with pytest.raises(ValueError, match=r"--journal .*: the folder does not exist"):
        ServeConfig(engine_url="http://h:1", listen=tcp, journal_path=tmp_path / "missing" / "journal")
