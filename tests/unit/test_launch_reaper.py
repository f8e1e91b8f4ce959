"""What a trainer started ends with it, however it goes: real processes, ended by their ids."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from adapter.launch import ManagedProcess, ReaperProcess
from adapter.launch import reaper as reaper_script
from adapter.launch.reaper import Session, process_state

SOON_S = 20.0
LIGHT_BYTES = 20 << 20


def wait_until(holds: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + SOON_S
    while not holds():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


def is_alive(pid: int) -> bool:
    state = process_state(pid)
    return state is not None and state.is_alive


@dataclass(frozen=True, slots=True)
class Trainer:
    """A trainer in a process of its own, and what it has started."""

    process: subprocess.Popen[str]
    folder: Path
    leader: int
    child: int
    reaper: int

    @property
    def shared_memory(self) -> Path:
        return Path("/dev/shm") / f"sgl_shm_{self.folder.name}"

    @property
    def folders(self) -> tuple[Path, Path]:
        return self.folder / "run", self.folder / "empty"

    def left(self) -> list[str]:
        """What of its server still exists."""
        processes = {"leader": self.leader, "child": self.child, "reaper": self.reaper}
        alive = [name for name, pid in processes.items() if is_alive(pid)]
        return alive + [path.name for path in (*self.folders, self.shared_memory) if path.exists()]

    def everything(self) -> list[str]:
        """What there is while it runs."""
        return ["leader", "child", "reaper", "run", "empty", self.shared_memory.name]


@contextmanager
def trainer(how: str, folder: Path) -> Iterator[Trainer]:
    command = [sys.executable, "-m", "tests.unit.launch_trainer", how, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        started = Trainer(process, folder, **told)
        try:
            yield started
        finally:
            process.kill()
            for pid in told.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            started.shared_memory.unlink(missing_ok=True)


def test_a_killed_trainer_leaves_nothing_though_its_server_ignores_sigterm(tmp_path: Path) -> None:
    with trainer("wait", tmp_path) as running:
        assert running.left() == running.everything()
        running.process.kill()
        assert wait_until(lambda: running.left() == []), running.left()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["reaper.log", "server.log"]


@pytest.mark.parametrize("how", ["exec", "exit"])
def test_a_trainer_that_goes_without_a_word_leaves_nothing(how: str, tmp_path: Path) -> None:
    with trainer(how, tmp_path) as running:
        assert wait_until(lambda: running.left() == []), running.left()


def test_a_forked_child_of_the_trainer_neither_ends_nor_saves_the_server(tmp_path: Path) -> None:
    with trainer("fork", tmp_path) as running:
        assert wait_until(lambda: _forked(running) is not None)
        forked = _forked(running)
        assert forked is not None
        time.sleep(1.0)  # its stop() and close() are over
        assert running.left() == running.everything()
        running.process.kill()
        assert wait_until(lambda: running.left() == []), running.left()
        forked.kill()


def _forked(running: Trainer) -> psutil.Process | None:
    children = psutil.Process(running.process.pid).children()
    return next((child for child in children if child.pid not in (running.leader, running.reaper)), None)


def test_a_stopped_server_and_a_goodbye_leave_only_its_folders(tmp_path: Path) -> None:
    with trainer("stop", tmp_path) as running:
        running.process.wait(SOON_S)
        assert running.left() == ["run", "empty"]


def test_after_a_goodbye_nothing_is_touched(tmp_path: Path) -> None:
    with trainer("goodbye", tmp_path) as running:
        running.process.wait(SOON_S)
        assert running.left() == ["leader", "child", "run", "empty", running.shared_memory.name]


def test_no_signal_but_sigkill_ends_the_reaper_before_its_trainer(tmp_path: Path) -> None:
    with ReaperProcess(tmp_path / "log") as reaper:
        assert os.getsid(reaper.pid) == reaper.pid
        assert wait_until(lambda: _ignores(reaper.pid, signal.SIGTERM))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(reaper.pid, number)
        time.sleep(0.3)
        assert is_alive(reaper.pid)
    assert not is_alive(reaper.pid)
    assert (tmp_path / "log").read_text() == ""


def _ignores(pid: int, number: signal.Signals) -> bool:
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigIgn" in line]
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_the_reaper_is_light(tmp_path: Path) -> None:
    with ReaperProcess(tmp_path / "log") as reaper:
        assert wait_until(lambda: _ignores(reaper.pid, signal.SIGTERM))
        assert psutil.Process(reaper.pid).memory_info().rss < LIGHT_BYTES


def test_a_stranger_with_a_watched_number_is_left_alone(tmp_path: Path) -> None:
    with sleeping(tmp_path) as sleeper:
        state = process_state(sleeper.pid)
        assert state is not None
        stranger = Session(sleeper.pid, state.started - 1)
        assert Session(sleeper.pid, state.started).members() == [sleeper.pid]
        assert stranger.members() == []
        stranger.kill()
        with _reaper_whose_owner_has_gone(tmp_path, stranger) as reaper:
            reaper.wait(SOON_S)
        assert is_alive(sleeper.pid)


@contextmanager
def sleeping(folder: Path) -> Iterator[ManagedProcess]:
    process = ManagedProcess("a sleeper", ["sleep", "1000"], folder / "sleep.log", grace_s=5.0)
    try:
        yield process
    finally:
        process.stop()


@contextmanager
def _reaper_whose_owner_has_gone(folder: Path, session: Session) -> Iterator["subprocess.Popen[bytes]"]:
    order = {"watch": {"leader": session.leader, "started": session.started, "grace_s": 0.0, "shm": []}}
    command = [sys.executable, "-I", "-S", reaper_script.__file__, "--owner", str(os.getpid())]
    with (
        (folder / "reaper.log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.close()  # no goodbye
        yield process
