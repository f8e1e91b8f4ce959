"""A VerlEngine that starts its server and its sidecar: a real sidecar, and a stand-in that is up within a second."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from adapter.errors import LaunchError
from adapter.launch import free_port
from adapter.launch.ports import PortClaim
from adapter.verl_engine import VerlEngine
from adapter.verl_engine.startup import DEFAULT_PORT
from tests.integration.support import wait_until
from tests.integration.verl_stub import arguments, described

pytestmark = pytest.mark.timeout(120)

WEIGHTS = [("model.embed.weight", torch.arange(8.0))]
SOON_S = 30.0


_of_other_tests: list[psutil.Process] = []
"""Sidecars that tests of this process share, and that were there before."""


@pytest.fixture(autouse=True)
def _leave_out_what_other_tests_have_started() -> None:
    _of_other_tests[:] = psutil.Process().children(recursive=True)


@dataclass(frozen=True, slots=True)
class Started:
    """What an engine occupies."""

    processes: tuple[psutil.Process, ...]
    port: int
    run_folder: Path
    log: Path

    def left(self) -> list[str]:
        processes = [str(process) for process in self.processes if _lives(process)]
        with socket.socket() as probe:
            listens = [f"port {self.port}"] if probe.connect_ex(("127.0.0.1", self.port)) == 0 else []
        return processes + listens + ([str(self.run_folder)] if self.run_folder.exists() else [])


def started(told: dict[str, Any]) -> Started:
    """By the trainer that says so."""
    own = tuple(_sessions_below(told["trainer"]))
    assert len(own) == 3, "the server, the sidecar and the reaper lead sessions of their own"
    port = urlsplit(told["server_url"]).port
    assert port is not None
    run_folder = Path(told["sidecar_target"].removeprefix("unix:")).parent
    return Started(own, port, run_folder, Path(told["server_log"]))


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def by_name(process: Started, name: str) -> psutil.Process:
    return next(process for process in process.processes if name in process.cmdline())


@contextmanager
def trainer(doing: str, folder: Path, **more: Any) -> Iterator["subprocess.Popen[str]"]:
    """In a process of its own."""
    logs = {"log_dir": str(folder / "logs")}
    command = [
        sys.executable,
        "-m",
        "tests.integration.verl_trainer",
        doing,
        json.dumps(arguments(folder, **logs, **more)),
    ]
    with (
        (folder / "stderr").open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def hear(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_the_server_gets_what_was_asked_for_and_nothing_of_the_trainers_temporary_files(tmp_path: Path) -> None:
    asked = arguments(tmp_path, log_level="info", enable_lora=True, env={"A": "1", "HOME": None}, port=free_port())
    with VerlEngine(**asked) as engine:
        lines = Path(str(engine.server_log)).read_text().splitlines()
        argv, environment = (json.loads(line.partition(" ")[2].removeprefix("with ")) for line in lines[:2])
        own = ["--model-path", "a/model", "--tp", "1", "--host", "127.0.0.1", "--port", str(asked["port"])]
        own += ["--custom-weight-loader", "adapter.loader.load"]
        assert argv == [*own, "--log-level", "info", "--enable-lora"]
        assert environment["A"] == "1"
        assert "HOME" not in environment
        assert Path(environment["TMPDIR"]).is_relative_to(Path(engine.sidecar_target.removeprefix("unix:")).parent)
        assert os.stat(Path(environment["TMPDIR"]).parents[1]).st_mode & 0o077 == 0


def test_an_update_goes_through_and_a_good_end_leaves_nothing_but_the_logs_that_were_asked_for(tmp_path: Path) -> None:
    with VerlEngine(**arguments(tmp_path, log_dir=str(tmp_path / "logs"))) as engine:
        mine = started(described(engine))
        assert engine.update_weights_from_tensor(WEIGHTS).weight_version == "1"
    assert mine.left() == []
    assert not mine.run_folder.parent.exists()
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["reaper.log", "server-0.log", "sidecar.log"]
    assert "ended in good order" in mine.log.read_text()


def test_logs_go_with_a_good_end_unless_they_were_asked_for(tmp_path: Path) -> None:
    with VerlEngine(**arguments(tmp_path)) as engine:
        mine = started(described(engine))
        assert mine.log.exists()
    assert not mine.log.parent.exists()


@pytest.mark.parametrize(
    ("argument", "name"), [("sglang.launch_server", "the SGLang server"), ("sidecar", "the sidecar")]
)
def test_a_process_that_dies_is_reported_at_once_and_by_every_call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], argument: str, name: str
) -> None:
    with VerlEngine(**arguments(tmp_path)) as engine:
        mine = started(described(engine))
        by_name(mine, argument).kill()
        told = f"weight-sync: {name} has ended unexpectedly (log: {mine.log.parent}"
        wait_until(lambda: told in capfd.readouterr().err)
        calls: list[Callable[[], Any]] = [
            lambda: engine.update_weights_from_tensor(WEIGHTS),
            lambda: engine.generate(input_ids=[1]),
            engine.flush_cache,
        ]
        for call in calls:
            with pytest.raises(LaunchError, match=f"^{name} has ended; the end of {mine.log.parent}"):
                call()
    assert mine.left() == []
    assert mine.log.exists(), "a person will want to read it"
    shutil.rmtree(mine.log.parent)


def test_a_server_that_dies_in_an_update_is_what_the_update_reports(tmp_path: Path) -> None:
    with VerlEngine(**arguments(tmp_path, log_dir=str(tmp_path / "logs"))) as engine:
        server = by_name(started(described(engine)), "sglang.launch_server")

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            server.kill()
            yield from WEIGHTS

        with pytest.raises(LaunchError, match="the SGLang server has ended"):
            engine.update_weights_from_tensor(weights())


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (
            "fail",
            r"the SGLang server ended before it was ready; the end of .*/server-0\.log:\n(.*\n)*this model does not",
        ),
        ("hang", r"the SGLang server was not ready within 3 s; the end of .*/server-0\.log:\nstarted with"),
    ],
)
def test_a_server_that_does_not_come_up_is_an_error_with_its_log_and_leaves_nothing(
    tmp_path: Path, behave: str, says: str
) -> None:
    with pytest.raises(LaunchError, match=says):
        VerlEngine(**arguments(tmp_path, behave=behave, start_timeout=3.0, log_dir=str(tmp_path / "logs")))
    assert _sessions_below(os.getpid()) == []


def test_a_sidecar_that_does_not_come_up_is_an_error_with_its_log_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"the sidecar ended before it was ready; the end of (.*\n)*.*--no-such-flag"):
        VerlEngine(**arguments(tmp_path, sidecar_args=["--no-such-flag"], log_dir=str(tmp_path / "logs")))
    assert _sessions_below(os.getpid()) == []


def _sessions_below(pid: int) -> list[psutil.Process]:
    """The leaders of all sessions that an engine of this process has started; torch has a helper with one, too."""
    below = [child for child in psutil.Process(pid).children(recursive=True) if _lives(child)]
    leaders = [child for child in below if os.getsid(child.pid) == child.pid and child.name() != "torch_shm_manager"]
    return [child for child in leaders if child not in _of_other_tests]


def test_a_port_that_is_in_use_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is in use: give port= another one, or server_url= and"):
            VerlEngine(**arguments(tmp_path, port=port))
    assert _sessions_below(os.getpid()) == []


def test_two_engines_on_one_host_do_not_take_each_others_port(tmp_path: Path) -> None:
    claim = PortClaim.take(DEFAULT_PORT)  # as an engine holds it whose server does not listen yet
    try:
        with VerlEngine(**arguments(tmp_path)) as engine:
            assert urlsplit(str(engine.server_url)).port != DEFAULT_PORT
    finally:
        if claim is not None:
            claim.close()


def test_a_second_engine_at_the_same_socket_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    where = {"sidecar": f"unix:{tmp_path / 's.sock'}", "log_dir": str(tmp_path / "logs")}
    with VerlEngine(**arguments(tmp_path, **where)) as first:
        with pytest.raises(LaunchError, match=r"the sidecar ended before it was ready(.*\n)*.*another sidecar serves"):
            VerlEngine(**arguments(tmp_path, **where))
        assert (tmp_path / "s.sock").is_socket()
        assert (tmp_path / "s.sock.lock").exists()
        assert first.update_weights_from_tensor(WEIGHTS).weight_version == "1"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("s.sock")] == []


@pytest.mark.parametrize("doing", ["end", "raise"])
def test_a_trainer_that_ends_without_a_shutdown_leaves_nothing(tmp_path: Path, doing: str) -> None:
    with trainer(doing, tmp_path) as process:
        told = hear(process)
        folder = Path(told["sidecar_target"].removeprefix("unix:")).parents[1]
        assert process.wait(SOON_S) == (1 if doing == "raise" else 0)
        assert not folder.exists()
        assert _listeners(told) == []


def _listeners(told: dict[str, Any]) -> list[str]:
    with socket.socket() as probe:
        port = urlsplit(told["server_url"]).port
        return [str(port)] if probe.connect_ex(("127.0.0.1", port)) == 0 else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGABRT])
def test_a_trainer_that_a_signal_ends_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with trainer("wait", tmp_path) as process:
        mine = started(hear(process))
        process.send_signal(number)
        process.wait(SOON_S)
        wait_until(lambda: mine.left() == [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_trainer_that_is_ended_while_its_server_starts_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with trainer("wait", tmp_path, behave="hang") as process:
        wait_until(lambda: "started with" in _text(tmp_path / "logs" / "server-0.log"))
        below = _sessions_below(process.pid)
        assert len(below) == 3
        process.send_signal(number)
        process.wait(SOON_S)
        wait_until(lambda: not any(map(_lives, below)))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_a_forked_child_of_the_trainer_that_ends_leaves_the_engine_alone(tmp_path: Path) -> None:
    with trainer("fork", tmp_path) as process:
        mine = started(hear(process))
        time.sleep(2.0)
        assert len([process for process in mine.processes if _lives(process)]) == 3
        process.kill()
        wait_until(lambda: mine.left() == [])


def test_a_start_that_takes_long_is_told_about(tmp_path: Path) -> None:
    with trainer("wait", tmp_path, behave="hang", start_timeout=7.0) as process:
        kind, message = hear(process)
        assert (kind, "was not ready within 7 s" in message) == ("LaunchError", True)
    log = tmp_path / "logs" / "server-0.log"
    assert f"weight-sync: waiting for the SGLang server, 5 s (log: {log}, " in (tmp_path / "stderr").read_text()
