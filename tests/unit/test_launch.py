"""Child processes, their shared memory and their ports."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapter.errors import LaunchError
from adapter.launch import EngineConfig, EngineProcess, ManagedProcess
from adapter.launch.ports import PortClaim, free_port, is_free, listens_among, listens_elsewhere

MAPS_SHARED_MEMORY = """
import mmap, os, sys, time
for name in sys.argv[1:]:
    fd = os.open(f"/dev/shm/{name}", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 4096)
    mapped = mmap.mmap(fd, 4096)
    globals()[name] = mapped
print("mapped", flush=True)
time.sleep(1000)
"""


def started(folder: Path, program: str, *args: str, prefixes: tuple[str, ...] = ()) -> ManagedProcess:
    command = [sys.executable, "-c", program, *args]
    return ManagedProcess("the child", command, folder / "log", grace_s=5.0, shm_prefixes=prefixes)


@pytest.mark.parametrize("killed_first", [False, True], ids=["stopped", "killed-before"])
def test_its_shared_memory_goes_with_it_and_nothing_else(tmp_path: Path, killed_first: bool) -> None:
    mine, other = f"sgl_shm_mq_{os.getpid()}_a", f"other_{os.getpid()}"
    process = started(tmp_path, MAPS_SHARED_MEMORY, mine, other, prefixes=("sgl_shm_",))
    try:
        process.wait_until(lambda: "mapped" in process.log_text(), 30.0)
        if killed_first:
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait_exit(10.0)
            assert process.session_members() == []
        process.stop()
        left = [name for name in (mine, other) if (Path("/dev/shm") / name).exists()]
        assert left == [other]
    finally:
        process.stop()
        (Path("/dev/shm") / other).unlink(missing_ok=True)


MAKES_A_SEMAPHORE = """
import multiprocessing, time
lock = multiprocessing.get_context("spawn").RLock()
print(lock._semlock.name.removeprefix("/"), flush=True)
time.sleep(1000)
"""


def test_its_semaphores_go_with_it_though_it_and_their_keeper_are_killed(tmp_path: Path) -> None:
    process = started(tmp_path, MAKES_A_SEMAPHORE, prefixes=("sem.mp-",))
    try:
        process.wait_until(lambda: "mp-" in process.log_text(), 30.0)
        semaphore = Path("/dev/shm") / f"sem.{process.log_text().strip()}"
        assert semaphore.exists()
        for pid in process.session_members():
            os.kill(pid, signal.SIGKILL)
        assert process.wait_exit(10.0)
        assert semaphore.exists()
        process.stop()
        assert not semaphore.exists()
    finally:
        process.stop()


def test_one_that_ends_too_early_says_so_with_the_end_of_its_log(tmp_path: Path) -> None:
    process = started(tmp_path, "print('no such model'); raise SystemExit(3)")
    with pytest.raises(LaunchError, match=rf"the child ended before it was ready; the end of {tmp_path}/log:\nno such"):
        process.wait_until(lambda: False, 30.0)
    process.stop()


def test_one_that_takes_too_long_says_so(tmp_path: Path) -> None:
    process = started(tmp_path, "import time; print('loading', flush=True); time.sleep(1000)")
    process.wait_until(lambda: "loading" in process.log_text(), 30.0)
    with pytest.raises(LaunchError, match=r"the child was not ready within 0\.2 s; the end of .*:\nloading"):
        process.wait_until(lambda: False, 0.2)
    process.stop()


def test_others_on_the_host_see_that_it_has_ended_before_it_is_reaped(tmp_path: Path) -> None:
    process = started(tmp_path, "import time; time.sleep(1000)")
    facts = process.facts
    assert not facts.has_ended()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait_exit(10.0)
    assert facts.has_ended()
    process.stop()
    assert facts.has_ended()


def test_a_log_that_is_added_to_is_told_from_this_start_on(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("an earlier life\n")
    process = started(tmp_path, "print('this life')")
    assert process.wait_exit(30.0)
    assert process.facts.log_text() == "this life\n"
    process.stop()


def test_a_claimed_port_is_not_claimed_again_until_it_is_let_go() -> None:
    port = free_port()
    claim = PortClaim.take(port)
    assert claim is not None
    assert PortClaim.take(port) is None
    other = PortClaim.take_any(port)
    assert other.port != port
    claim.close()
    again = PortClaim.take(port)
    assert again is not None
    for held in (other, again):
        held.close()


def test_a_port_that_somebody_listens_at_is_not_claimed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free(port)
        assert PortClaim.take(port) is None


def test_who_listens_at_a_port_is_told_by_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "1000"]) as stranger:
        port = server.getsockname()[1]
        assert not listens_elsewhere(port, [stranger.pid, os.getpid()])
        assert listens_elsewhere(port, [stranger.pid])
        assert not listens_elsewhere(free_port(), [stranger.pid])
        stranger.kill()


def test_another_server_on_its_port_is_not_taken_for_the_engine(tmp_path: Path) -> None:
    """SGLang loads for minutes before it finds its port taken."""
    program = "import http.server as h; H = h.SimpleHTTPRequestHandler; s = h.HTTPServer(('127.0.0.1', {}), H); {}"
    port = free_port()
    (tmp_path / "model_info").touch()
    serve = [sys.executable, "-c", program.format(port, "s.serve_forever()")]
    with subprocess.Popen(serve, cwd=tmp_path, stderr=subprocess.DEVNULL) as other:
        try:
            _wait_for_listener(port)
            config = EngineConfig(model_path="none", log_path=tmp_path / "log", port=port, ready_timeout_s=2.0)
            with pytest.raises(LaunchError):
                EngineProcess(config)
        finally:
            other.kill()


def _wait_for_listener(port: int) -> None:
    give_up = time.monotonic() + 20.0
    while is_free(port):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_who_listens_at_a_socket_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a b.sock"
    assert listens_among(path, [os.getpid()]) is None
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        assert listens_among(path, [os.getpid()]) is None, "it is only bound"
        server.listen()
        assert listens_among(path, [os.getpid()]) is True
        assert listens_elsewhere(path, [os.getppid()])
        client.connect(str(path))
        accepted, _ = server.accept()
        server.close()
        assert listens_among(path, [os.getpid()]) is None, "a connection does not listen"
        accepted.close()
