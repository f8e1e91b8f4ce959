"""The processes that a weight sync needs: an SGLang server and the sidecar beside it.

Each runs as the leader of a session of its own, with its output in a log file. Invariant: `stop` ends exactly the
processes of that session, children included, and returns when none is left; nothing is ever looked up by name.
The leader stays unreaped until then, so that the kernel cannot give its id to anybody else.

    with EngineProcess(EngineConfig(model_path=model, log_path=log)) as engine:
        with SidecarProcess(SidecarConfig(engine_url=engine.url, listen="unix:/tmp/s.sock", log_path=log2)):
            ...

Neither torch nor SGLang is imported here.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adapter.errors import LaunchError

_POLL_S = 0.1
_LOG_TAIL_BYTES = 4000
# Helpers that outlive their leader by a moment remove files on their way out, so they get that moment.
_LINGER_S = 5.0


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now.

    Below the range that outgoing connections take theirs from, and low enough for SGLang 0.5.15, which also wants the
    port 10000 above to exist.
    """
    while True:
        port = random.randrange(20_000, 30_000)  # noqa: S311 - no secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _session_members(session_id: int) -> Iterator[int]:
    """The live processes of a session; zombies only wait for their parent and do not count."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The command's name, in parentheses, may itself hold spaces and parentheses.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == session_id and state not in "ZX":
                yield int(entry.name)


class ManagedProcess:
    """One child process that leads its own session.

    Args:
        name: What messages call it.
        argv: The command.
        log_path: Where its output goes; added to if it exists.
        env: Variables to set, or to unset where the value is None, on top of this process's own.
        grace_s: How long `stop` waits between SIGTERM and SIGKILL.
        pass_fds: File descriptors that the child inherits.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log_path: Path,
        *,
        env: Mapping[str, str | None] | None = None,
        grace_s: float = 20.0,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._grace_s = grace_s
        merged = {**os.environ, **(env or {})}
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                list(argv),
                env={key: value for key, value in merged.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    @property
    def pid(self) -> int:
        """The session's leader."""
        return self._popen.pid

    def has_exited(self) -> bool:
        """Whether the leader has ended. Does not reap it."""
        if self._popen.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def log_text(self) -> str:
        """What the process has written so far."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Polls until `is_ready`.

        Raises:
            LaunchError: The process ended first, or the time ran out. Carries the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if self.has_exited():
                raise LaunchError(f"{self.name} ended before it was ready{self._log_tail()}")
            if time.monotonic() > deadline:
                raise LaunchError(f"{self.name} was not ready within {timeout_s:g} s{self._log_tail()}")
            time.sleep(_POLL_S)

    def wait_exit(self, timeout_s: float) -> bool:
        """Whether the leader ends within the time."""
        deadline = time.monotonic() + timeout_s
        while not self.has_exited():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def stop(self) -> None:
        """Ends the session: SIGTERM to its leader, later SIGKILL to whatever is left. May be called again."""
        if self._popen.returncode is not None:
            return
        try:
            if not self.has_exited():
                self._popen.terminate()
                self.wait_exit(self._grace_s)
            self._wait_for_helpers()
        finally:  # also when Ctrl-C comes in the middle of the wait
            self._kill_session()
            self._popen.wait()

    def session_members(self) -> list[int]:
        """The processes of the session that still run."""
        return list(_session_members(self.pid))

    def _wait_for_helpers(self) -> None:
        deadline = time.monotonic() + _LINGER_S
        while self.has_exited() and self.session_members() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _kill_session(self) -> None:
        while members := self.session_members():
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _log_tail(self) -> str:
        tail = self.log_text()[-_LOG_TAIL_BYTES:].strip()
        return f"; the end of {self.log_path}:\n{tail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to start one SGLang server on this host.

    Attributes:
        model_path: What `--model-path` names.
        log_path: Where the server's output goes.
        tp_size: TP ranks.
        port: The HTTP port; None takes a free one.
        args: Further arguments of `sglang.launch_server`.
        env: Variables to set, or to unset where the value is None.
        pythonpath: Folders to put first on PYTHONPATH.
        ready_timeout_s: How long the start may take.
        grace_s: How long its orderly end may take.
    """

    model_path: Path
    log_path: Path
    tp_size: int = 1
    port: int | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    pythonpath: tuple[Path, ...] = ()
    ready_timeout_s: float = 180.0
    grace_s: float = 20.0

    def command(self, port: int) -> list[str]:
        """The command line that serves on this port."""
        fixed = ["--model-path", str(self.model_path), "--tp", str(self.tp_size)]
        address = ["--host", "127.0.0.1", "--port", str(port)]
        return [sys.executable, "-m", "sglang.launch_server", *fixed, *address, *self.args]

    def environment(self) -> dict[str, str | None]:
        """`env` with the PYTHONPATH that `pythonpath` asks for."""
        folders = [str(folder) for folder in self.pythonpath]
        inherited = os.environ.get("PYTHONPATH")
        if inherited:
            folders.append(inherited)
        return {**self.env, "PYTHONPATH": os.pathsep.join(folders) or None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarConfig:
    """How to start the sidecar.

    Attributes:
        engine_url: The SGLang server's HTTP address.
        listen: `unix:/path.sock` or `host:port`.
        log_path: Where its output goes.
        args: Further arguments of `sidecar serve`.
        ready_timeout_s: How long the start may take.
        grace_s: How long its orderly end may take.
    """

    engine_url: str
    listen: str
    log_path: Path
    args: tuple[str, ...] = ()
    ready_timeout_s: float = 30.0
    grace_s: float = 10.0

    def command(self) -> list[str]:
        """The command line."""
        where = ["--engine-url", self.engine_url, "--listen", self.listen]
        return [sys.executable, "-m", "sidecar", "serve", *where, *self.args]


class _Started:
    """A process that its owner starts with the object and stops with the `with` block."""

    process: ManagedProcess

    def __init__(self, process: ManagedProcess, is_ready: Callable[[], bool], timeout_s: float) -> None:
        self.process = process
        try:
            process.wait_until(is_ready, timeout_s)
        except BaseException:  # whatever ends the wait, Ctrl-C too, must not leave the process behind
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process that was started; its children belong to it."""
        return self.process.pid

    def stop(self) -> None:
        """Ends it and its children. May be called again."""
        self.process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class EngineProcess(_Started):
    """A running SGLang server; ready when the constructor returns.

    Raises:
        LaunchError: It ended, or was not ready in time.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.port = config.port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        process = ManagedProcess(
            "the SGLang server",
            config.command(self.port),
            config.log_path,
            env=config.environment(),
            grace_s=config.grace_s,
        )
        super().__init__(process, self._is_up, config.ready_timeout_s)

    def stop(self) -> None:
        """Ends the server and what it leaves in shared memory. May be called again."""
        members = self.process.session_members()
        super().stop()
        for pid in members:  # files of 25 MB that carry their maker's id; SGLang removes them only in its own CI
            for left_over in Path("/dev/shm").glob(f"sgl_shm_*_{pid}_*"):  # noqa: S108 - its name is SGLang's choice
                left_over.unlink(missing_ok=True)

    def _is_up(self) -> bool:
        # /health would generate a token, and answers 503 while generation is paused.
        with requests.Session() as session:
            session.trust_env = False  # no proxy stands between this host and itself
            try:
                return session.get(f"{self.url}/model_info", timeout=5).ok
            except requests.RequestException:
                return False

    def count_requests(self, method: str, path: str) -> int:
        """How often the server itself says, in its access log, that it answered this."""
        return self.process.log_text().count(f'"{method} {path} HTTP/')


class SidecarProcess(_Started):
    """A running sidecar; ready when the constructor returns.

    Raises:
        LaunchError: It ended, or was not ready in time.
    """

    def __init__(self, config: SidecarConfig) -> None:
        self.listen = config.listen
        process = ManagedProcess("the sidecar", config.command(), config.log_path, grace_s=config.grace_s)
        super().__init__(process, lambda: sidecar_is_serving(config.listen), config.ready_timeout_s)


def sidecar_is_serving(target: str, timeout_s: float = 1.0) -> bool:
    """Whether the sidecar's own health service answers SERVING."""
    # A pool of its own: a channel shared with an earlier, refused try would wait out that one's back-off.
    with grpc.insecure_channel(
        target, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    ) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
