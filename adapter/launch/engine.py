"""A real SGLang server as a child process. SGLang is not imported here.

Invariant: ready means that this server answers, not another one that has its port.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapter.engine_client import EngineClient
from adapter.launch.ports import free_port, listens_elsewhere
from adapter.launch.process import ManagedProcess, Started
from adapter.launch.reaper_process import ReaperProcess

# Message queues of 25 MB, load figures and semaphores. SGLang removes them only in its own CI; a process that is killed
# leaves its semaphores too.
SHARED_MEMORY_PREFIXES = ("sgl_shm_", "sglang_loads_", "sem.mp-")
SERVER = "the SGLang server"
CUSTOM_LOADER, REPLAY_LOADER = "--custom-weight-loader", "adapter.loader.load"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to start one SGLang server on this host.

    Attributes:
        model_path: What `--model-path` names.
        log_path: Where the server's output goes.
        tp_size: TP ranks.
        host: Where the server listens.
        port: The HTTP port; None takes a free one.
        args: Further arguments of `sglang.launch_server`.
        env: Variables to set, or to unset where the value is None.
        pythonpath: Folders to put first on PYTHONPATH.
        prefix: What the command is started through, such as `numactl --cpunodebind 0` or `ip netns exec NAME`.
        replay: Whether it gets the replay loader (`adapter.loader`), which the sidecar then uses.
        serves_http: Whether it answers requests; of a server of several nodes, only the first does.
        ready_timeout_s: How long the start may take.
        grace_s: How long its orderly end may take.
    """

    model_path: Path | str
    log_path: Path
    tp_size: int = 1
    host: str = "127.0.0.1"
    port: int | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    pythonpath: tuple[Path, ...] = ()
    prefix: tuple[str, ...] = ()
    replay: bool = True
    serves_http: bool = True
    ready_timeout_s: float = 180.0
    grace_s: float = 20.0

    def command(self, port: int) -> list[str]:
        """The command line that serves on this port."""
        fixed = ["--model-path", str(self.model_path), "--tp", str(self.tp_size)]
        address = ["--host", self.host, "--port", str(port)]
        loader = [CUSTOM_LOADER, REPLAY_LOADER] if self.replay and CUSTOM_LOADER not in self.args else []
        return [*self.prefix, sys.executable, "-m", "sglang.launch_server", *fixed, *address, *loader, *self.args]

    def environment(self) -> dict[str, str | None]:
        """`env` with the PYTHONPATH that `pythonpath` asks for."""
        folders = [str(folder) for folder in self.pythonpath]
        inherited = os.environ.get("PYTHONPATH")
        if inherited:
            folders.append(inherited)
        return {**self.env, "PYTHONPATH": os.pathsep.join(folders) or None}


class EngineProcess(Started):
    """A running SGLang server; ready when the constructor returns, unless it was told not to wait.

    Raises:
        LaunchError: It ended, or was not ready in time.
    """

    def __init__(self, config: EngineConfig, *, reaper: ReaperProcess | None = None, wait: bool = True) -> None:
        self.port = config.port or free_port()
        self.url = f"http://{reachable_host(config.host)}:{self.port}"
        self._serves_http = config.serves_http
        process = ManagedProcess(
            SERVER,
            config.command(self.port),
            config.log_path,
            env=config.environment(),
            grace_s=config.grace_s,
            shm_prefixes=SHARED_MEMORY_PREFIXES,
            reaper=reaper,
        )
        super().__init__(process, config.ready_timeout_s, wait=wait)

    def is_ready(self) -> bool:
        """Whether it answers; one that serves no requests is waited for by the one that does."""
        return not self._serves_http or (EngineClient(self.url).answers() and self._has_its_port())

    def _has_its_port(self) -> bool:
        return not listens_elsewhere(self.port, self.process.session_members())

    def count_requests(self, method: str, path: str) -> int:
        """How often the server itself says, in its access log, that it answered this."""
        return self.process.log_text().count(f'"{method} {path} HTTP/')


def reachable_host(host: str) -> str:
    """Where a server that listens at ``host`` is reached from its own host, as part of a URL."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
