"""Which process listens at a port: real children that listen, die and come back."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapter.launch import free_port
from sidecar.config import Timeouts
from sidecar.engine.listener import is_alive, listener_of
from sidecar.engine.sglang import SGLangEngine
from sidecar.engine.watch import EngineWatch

LISTENER = """
import os, socket, sys
host, port, helper = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["with a helper"]
server = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
if helper and os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("listening", flush=True)
sys.stdin.read()
"""
# The same seed and the same version in every life: nothing that HTTP shows tells them apart.
ENGINE = """
import sys
from tests.fakes import ScriptedEngine
engine = ScriptedEngine(sys.argv[1], port=int(sys.argv[2]), server_info={"random_seed": 42})
print("listening", flush=True)
sys.stdin.read()
engine.close()
"""
REPOSITORY = Path(__file__).parents[2]


@contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has something listening by now, killed at the end; its children end with its input."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"listening\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def port() -> int:
    return free_port()


def url(port: int, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{port}"


def test_a_listening_process_is_named_by_its_id_and_its_start(port: int) -> None:
    with child(LISTENER, "127.0.0.1", str(port)) as process:
        identity = listener_of(url(port))
        pid, _, start = identity.partition("/")
        assert int(pid) == process.pid
        assert int(start) > 0
        assert identity == listener_of(url(port, "localhost"))
        assert is_alive(identity)


def test_a_process_that_was_killed_is_not_alive_whether_it_is_reaped_or_not(port: int) -> None:
    with child(LISTENER, "127.0.0.1", str(port)) as process:
        identity = listener_of(url(port))
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(identity)
        assert listener_of(url(port)) == ""
        process.wait()
        assert not is_alive(identity)


def test_a_process_that_took_a_dead_ones_port_is_another(port: int) -> None:
    with child(LISTENER, "127.0.0.1", str(port)):
        before = listener_of(url(port))
    with child(LISTENER, "127.0.0.1", str(port)):
        after = listener_of(url(port))
        assert after
        assert after != before
        assert not is_alive(before)


def test_an_id_that_somebody_else_has_by_now_is_not_the_same_process() -> None:
    own = f"{os.getpid()}/1"
    assert not is_alive(own)


def test_a_stopped_process_is_alive(port: int) -> None:
    with child(LISTENER, "127.0.0.1", str(port)) as process:
        identity = listener_of(url(port))
        process.send_signal(signal.SIGSTOP)
        assert is_alive(identity)
        assert listener_of(url(port)) == identity


def test_a_forked_helper_that_holds_the_socket_as_well_is_not_the_server(port: int) -> None:
    with child(LISTENER, "127.0.0.1", str(port), "with a helper") as process:
        assert listener_of(url(port)).partition("/")[0] == str(process.pid)


def test_an_ipv6_listener_is_seen(port: int) -> None:
    with child(LISTENER, "::1", str(port)) as process:
        assert listener_of(url(port, "[::1]")).partition("/")[0] == str(process.pid)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_listener_at_every_address_listens_at_this_one(host: str, port: int) -> None:
    with child(LISTENER, host, str(port)) as process:
        assert listener_of(url(port)).partition("/")[0] == str(process.pid)


def test_a_listener_at_another_address_of_this_host_is_somebody_else(port: int) -> None:
    with child(LISTENER, "127.0.0.2", str(port)), child(LISTENER, "127.0.0.1", str(port)) as process:
        assert listener_of(url(port)).partition("/")[0] == str(process.pid)


@pytest.mark.parametrize(
    "where",
    ["http://192.0.2.1:{port}", "http://engine.example:{port}"],
)
def test_what_listens_on_another_host_is_not_seen(where: str, port: int) -> None:
    with child(LISTENER, "127.0.0.1", str(port)):
        assert listener_of(where.format(port=port)) == ""


@pytest.mark.parametrize("where", ["http://127.0.0.1:99999", "http://127.0.0.1:port"])
def test_an_address_that_is_none_is_not_seen_and_breaks_nothing(where: str) -> None:
    assert listener_of(where) == ""


def test_where_nobody_listens_nobody_is_seen(port: int) -> None:
    assert listener_of(url(port)) == ""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", port))
        assert listener_of(url(port)) == "", "bound, and not listening"


def test_what_was_never_seen_is_taken_for_alive() -> None:
    assert is_alive("")


@pytest.mark.parametrize("release", ["0.5.23", "0.5.15.post1"])
def test_a_server_that_was_started_again_with_the_same_seed_is_another_life(release: str, port: int) -> None:
    """No look falls into the time without a server, so no refused connection tells either."""
    engine = SGLangEngine(url(port), Timeouts())
    changes: list[int] = []
    watch = EngineWatch(engine, lambda: changes.append(engine.epoch))

    async def looks(until_epoch: int) -> None:
        for _ in range(3):
            await watch.look()
        assert engine.epoch == until_epoch

    with asyncio.Runner() as runner:
        with child(ENGINE, release, str(port)):
            runner.run(looks(until_epoch=1))
            before = _process(engine)
        with child(ENGINE, release, str(port)):
            runner.run(looks(until_epoch=2))
            assert _process(engine) != before
        engine.close()
    assert changes[-1] == 2


def _process(engine: SGLangEngine) -> str:
    assert engine.info is not None
    return engine.info.process
