"""The sidecar as a child process. Of its code, only the command line is known here."""

import sys
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adapter.credentials import NO_CREDENTIALS, Credentials
from adapter.launch.ports import listens_among
from adapter.launch.process import ManagedProcess, Started
from adapter.launch.reaper_process import ReaperProcess

SIDECAR = "the sidecar"


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarConfig:
    """How to start the sidecar.

    Attributes:
        engine_url: The SGLang server's HTTP address.
        listen: `unix:/path.sock` or `host:port`.
        log_path: Where its output goes.
        args: Further arguments of `sidecar serve`.
        prefix: What the command is started through.
        ready_timeout_s: How long the start may take.
        grace_s: How long its orderly end may take.
        credentials: For a sidecar whose arguments ask for TLS.
    """

    engine_url: str
    listen: str
    log_path: Path
    args: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    ready_timeout_s: float = 30.0
    grace_s: float = 10.0
    credentials: Credentials = NO_CREDENTIALS

    def command(self) -> list[str]:
        """The command line."""
        where = ["--engine-url", self.engine_url, "--listen", self.listen]
        return [*self.prefix, sys.executable, "-m", "sidecar", "serve", *where, *self.args]


class SidecarProcess(Started):
    """A running sidecar; ready when the constructor returns, unless it was told not to wait.

    Raises:
        LaunchError: It ended, or was not ready in time.
    """

    def __init__(self, config: SidecarConfig, *, reaper: ReaperProcess | None = None, wait: bool = True) -> None:
        self.listen = config.listen
        self._credentials = config.credentials
        process = ManagedProcess(SIDECAR, config.command(), config.log_path, grace_s=config.grace_s, reaper=reaper)
        super().__init__(process, config.ready_timeout_s, wait=wait)

    def is_ready(self) -> bool:
        """Whether it serves, beside an engine or before one; not another sidecar that has its address."""
        serving = sidecar_is_serving(self.listen, credentials=self._credentials)
        return serving and self.listens() is not False

    def listens(self) -> bool | None:
        """Whether it listens at its address; False if another process does, None if nobody is seen to."""
        return listens_among(_address(self.listen), self.process.session_members())


def _address(listen: str) -> int | Path:
    path = listen.removeprefix("unix:")
    return Path(path) if path != listen else int(listen.rpartition(":")[2])


def sidecar_is_serving(target: str, timeout_s: float = 1.0, credentials: Credentials = NO_CREDENTIALS) -> bool:
    """Whether the sidecar's own health service answers SERVING."""
    # A pool of its own: a channel shared with an earlier, refused try would wait out that one's back-off.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with credentials.channel(target, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
