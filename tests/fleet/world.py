"""The real processes of a fleet: on every host an SGLang server and its sidecar, and the trainer here.

Owns their lives. Invariant: everything is ended with the `with` block, by process id.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from adapter.demo import tiny_model
from adapter.demo.cpu_engine import cpu_engine
from adapter.engine_client import EngineClient
from adapter.errors import WeightSyncError
from adapter.launch import EngineConfig, EngineProcess, SidecarConfig, SidecarProcess
from adapter.sidecar_stub import SidecarStub
from tests.fleet.network import INTERFACE, Host, Network, network

HTTP_PORT, SIDECAR_PORT, PROBE_PORT = 30000, 50051, 8080
# Short, so that a fault is over soon; a healthy update of the tiny model takes some tenths of a second.
TIMEOUTS = ("--load-timeout", "15", "--bucket-timeout", "10", "--decide-timeout", "10", "--group-timeout", "30")
START_S = 300.0


class Site:
    """One host's engine and sidecar."""

    def __init__(self, host: Host, workdir: Path) -> None:
        self.host = host
        self.workdir = workdir
        workdir.mkdir()
        self._stub = SidecarStub(self.target)
        self._config = self._engine_config()
        self.engine = EngineProcess(self._config, wait=False)
        self.sidecar = SidecarProcess(self._sidecar_config(), wait=False)

    @property
    def target(self) -> str:
        """Where the sidecar listens."""
        return f"{self.host.address}:{SIDECAR_PORT}"

    @property
    def url(self) -> str:
        """Where the engine answers."""
        return f"http://{self.host.address}:{HTTP_PORT}"

    @property
    def probe(self) -> str:
        """Where the sidecar says whether the engine is ready."""
        return f"http://{self.host.address}:{PROBE_PORT}/readyz"

    def answers(self) -> bool:
        """Whether both are there, and know of each other."""
        return EngineClient(self.url).answers() and self._stub.status().HasField("engine")

    def kill_engine(self) -> None:
        """As the kernel would: every process of the server at once."""
        os.kill(self.engine.pid, signal.SIGKILL)
        self.engine.stop()

    def restart_engine(self) -> None:
        """Another one in its place."""
        self.engine = EngineProcess(self._config, wait=False)

    def kill_sidecar(self) -> None:
        """SIGKILL."""
        os.kill(self.sidecar.pid, signal.SIGKILL)
        self.sidecar.stop()

    def restart_sidecar(self) -> None:
        """Another one in its place."""
        self.sidecar = SidecarProcess(self._sidecar_config(), wait=False)

    def stop(self) -> None:
        """End both."""
        self._stub.close()
        self.sidecar.stop()
        self.engine.stop()

    def _engine_config(self) -> EngineConfig:
        model = tiny_model.write_config(self.workdir / "model")
        # What is cached, or batched, is rounded in other ways: in bfloat16 that turns a token now and then.
        config = cpu_engine(self.workdir, model, extra_args=("--dtype", "float32"))
        return dataclasses.replace(
            config,
            host="0.0.0.0",
            port=HTTP_PORT,
            prefix=self.host.prefix,
            env={**config.env, "GLOO_SOCKET_IFNAME": INTERFACE},
            replay=False,
        )

    def _sidecar_config(self) -> SidecarConfig:
        http = ("--http-listen", f"{self.host.address}:{PROBE_PORT}")
        journal = ("--journal", str(self.workdir / "journal"))
        return SidecarConfig(
            engine_url=f"http://127.0.0.1:{HTTP_PORT}",
            listen=self.target,
            log_path=self.workdir / "sidecar.log",
            args=("--insecure", "--require-update", *http, *journal, *TIMEOUTS),
            prefix=self.host.prefix,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """All of it."""

    network: Network
    sites: tuple[Site, ...]

    @property
    def targets(self) -> list[str]:
        """Of every sidecar."""
        return [site.target for site in self.sites]


@contextlib.contextmanager
def open_world(workdir: Path, num_hosts: int = 3) -> Iterator[World]:
    """Start everything, one server after the other: they import for half a minute each."""
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network(num_hosts))
        sites = []
        for number, host in enumerate(net.hosts):
            site = Site(host, workdir / f"host-{number}")
            stack.callback(site.stop)
            wait_until(site.answers, START_S, f"host {number}")
            sites.append(site)
        yield World(net, tuple(sites))


def wait_until(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Fails the test if it does not."""
    give_up = time.monotonic() + seconds
    while not _happened(happened):
        assert time.monotonic() < give_up, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def _happened(happened: Callable[[], bool]) -> bool:
    with contextlib.suppress(WeightSyncError):
        return happened()
    return False
