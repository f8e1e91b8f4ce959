"""The processes that one rank has started: its node's server, on the first node the sidecar, and the reaper.

Invariant: after ``stop``, or some seconds after this process was killed, none of them is left, nor a socket, a port,
a temporary file or shared memory of theirs. Logs stay unless all went well.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from adapter.errors import LaunchError
from adapter.launch import EngineConfig, EngineProcess, ReaperProcess, SidecarConfig, SidecarProcess
from adapter.launch.ports import PortClaim
from adapter.launch.process import ManagedProcess, ProcessFacts

PREFIX = "weight-sync-"
# A socket's path may have 107 bytes; the longest that SGLang makes in its folder is tmpXXXXXXXX.
_LONGEST_FOLDER = 107 - len("/run/t/tmpXXXXXXXX")
_WATCH_S = 0.5
_LOOK_S = 5.0


class Fleet:
    """Starts nothing but the reaper by itself. Used by the thread that made it, and its own watcher."""

    def __init__(self, log_dir: Path | None) -> None:
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        self.folder = _private_folder()
        self.run_folder = self.folder / "run"
        self.temporary = self.run_folder / "t"
        self.log_folder = log_dir or self.folder
        self.server: EngineProcess | None = None
        self.sidecar: SidecarProcess | None = None
        self.claim: PortClaim | None = None
        self._keep_logs = log_dir is not None
        self._sidecar_files: list[Path] = []
        self._owner = os.getpid()
        self._stopping = threading.Event()
        self.temporary.mkdir(parents=True, mode=0o700)
        self._reaper = ReaperProcess(self.log_folder / "reaper.log")
        self._reaper.remove(self.run_folder)
        self._reaper.remove_if_empty(self.folder)

    @property
    def socket(self) -> str:
        """Where the sidecar listens unless it was told."""
        return f"unix:{self.run_folder / 'sidecar.sock'}"

    def claim_port(self, preferred: int) -> int:
        """A port that no other engine of ours takes meanwhile."""
        self.claim = PortClaim.take_any(preferred)
        return self.claim.port

    def start_server(self, config: EngineConfig) -> str:
        """Returns at once, with its address."""
        self.server = EngineProcess(config, reaper=self._reaper, wait=False)
        return self.server.url

    def start_sidecar(self, config: SidecarConfig) -> None:
        """Returns at once."""
        self.sidecar = SidecarProcess(config, reaper=self._reaper, wait=False)

    def processes(self) -> list[ManagedProcess]:
        """Those that the engine needs, the server first."""
        return [started.process for started in (self.server, self.sidecar) if started is not None]

    def facts(self) -> list[ProcessFacts]:
        """For this rank and the others on its host."""
        return [process.facts for process in self.processes()]

    def check_starting(self) -> None:
        """Raises ``LaunchError`` if one has ended while it was starting."""
        self._adopt_files()
        try:
            for process in self.processes():
                process.check_starting()
        except LaunchError:
            self._keep_logs = True
            raise

    def sidecar_serves(self) -> bool:
        """Whether what serves at the sidecar's address is not another process; raises as ``check_starting``."""
        self.check_starting()
        return self.sidecar is None or self.sidecar.listens() is not False

    def _adopt_files(self) -> None:
        """What lies where the sidecar listens is ours only once it listens: before, another one may serve there."""
        if self.sidecar is not None and not self._sidecar_files and self.sidecar.listens():
            self._sidecar_files = _files_beside(self.sidecar.listen)
            for path in self._sidecar_files:
                self._reaper.remove(path)

    def keep_logs(self) -> None:
        """Something went wrong that a person will want to look into."""
        self._keep_logs = True

    def watch(self) -> None:
        """From now on, whatever ends by itself is told on stderr."""
        for process in self.processes():
            process.look()
        threading.Thread(target=self._watch, name="weight-sync-watch", daemon=True).start()

    def _watch(self) -> None:
        running, next_look = self.processes(), time.monotonic() + _LOOK_S
        while running and not self._stopping.wait(_WATCH_S):
            for process in [process for process in running if process.facts.has_ended()]:
                self._tell_end(process)
                running.remove(process)
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK_S
                for process in running:
                    process.look()

    def _tell_end(self, process: ManagedProcess) -> None:
        if not self._stopping.is_set():
            self._keep_logs = True
            say(f"{process.name} has ended unexpectedly (log: {process.log_path})")

    def stop(self) -> None:
        """End everything, the sidecar first. May be called again; a forked child of this process ends nothing."""
        if os.getpid() != self._owner or self._stopping.is_set():
            return
        self._stopping.set()
        self._adopt_files()
        self._keep_logs |= any(process.has_exited() for process in self.processes())
        with contextlib.ExitStack() as last_to_first:
            last_to_first.callback(self._remove_files)
            last_to_first.callback(self._reaper.close)
            if self.claim is not None:
                last_to_first.callback(self.claim.close)
            for started in (self.server, self.sidecar):
                if started is not None:
                    last_to_first.callback(started.stop)

    def _remove_files(self) -> None:
        for path in self._sidecar_files:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.run_folder if self._keep_logs else self.folder, ignore_errors=True)
        for path in _files(self.folder):  # logs that are kept
            if path.stat().st_size == 0:
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _files_beside(listen: str) -> list[Path]:
    """What a sidecar that is killed leaves where it listens. Its journal is of an engine that ends with it."""
    path = listen.removeprefix("unix:")
    return [Path(path + ending) for ending in ("", ".lock", ".journal")] if path != listen else []


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _private_folder() -> Path:
    """For this user alone; short enough for sockets in it."""
    folder = tempfile.mkdtemp(prefix=PREFIX)
    if len(folder) <= _LONGEST_FOLDER:
        return Path(folder)
    os.rmdir(folder)
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))


def say(text: str) -> None:
    """To whoever watches the trainer's output."""
    sys.stderr.write(f"weight-sync: {text}\n")
    sys.stderr.flush()
