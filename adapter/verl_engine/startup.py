"""How an engine comes up: who starts what, and how all ranks learn that it is ready, or why not.

    introduce    every rank checks its arguments and says which host and which GPU it is on
    start        the first rank of each node starts that node's server, rank 0 the sidecar beside its own
    wait         in rounds of a second, in which every rank says that it waits, is ready, or has failed and why
    connect      every rank reaches the sidecar by itself

Invariant: on a mesh a failure of one rank is raised on all of them within a round; without one each rank waits for
itself. No wait is longer than ``start_timeout``, and whoever waits says so on stderr.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from adapter.client import WeightSyncClient
from adapter.engine_client import EngineClient
from adapter.errors import LaunchError, WeightSyncError
from adapter.exchange import Exchange
from adapter.launch import EngineConfig, SidecarConfig, sidecar_is_serving
from adapter.launch.ports import free_port, is_free
from adapter.membership import Membership
from adapter.server_args import to_argv
from adapter.verl_engine.facts import EngineFacts, Ready, facts_of_all, largest_version, memory_facts
from adapter.verl_engine.fleet import Fleet, say
from adapter.verl_engine.hosts import (
    clean_environment,
    gpu_environment,
    host_address,
    host_identity,
    trainer_gpu,
)
from adapter.verl_engine.options import Options, several_hosts_need_tcp

DEFAULT_PORT = 30000
_ROUND_S = 1.0
_ALONE_S = 0.2
_SAY_S = 5.0
_ANSWER_S = 10.0
_CONNECT_S = 60.0

Peer = dict[str, Any]


class Startup:
    """One rank's part of it. ``fleet`` holds what it has started, also after a failure."""

    def __init__(
        self, options: Options, member: Membership, exchange: Exchange | None, client: Callable[[str], WeightSyncClient]
    ) -> None:
        self._options = options
        self._member = member
        self._exchange = exchange
        self._make_client = client
        self._begun = time.monotonic()
        self._said = self._begun
        self._waits_for = "the server and the sidecar"
        self._url = options.server_url
        self._target = options.sidecar
        self.fleet: Fleet | None = None
        self.client: WeightSyncClient | None = None

    def run(self) -> EngineFacts:
        """Returns when all ranks are ready. Raises ``LaunchError``, or ``ValueError`` for the caller's mistakes."""
        peers: list[Peer] = self._agree(self._introduce)
        self._agree(lambda: self._start(peers))
        facts = facts_of_all([Ready.from_json(rank) for rank in self._until_all_are_ready()])
        self._agree(lambda: self._connect(facts))
        return facts

    # The ranks among themselves.

    def _agree(self, step: Callable[[], Any]) -> list[Any]:
        def checked() -> Any:
            try:
                return step()
            except OSError as error:
                raise LaunchError(f"the engine could not be started: {error}") from error

        return [checked()] if self._exchange is None else self._exchange.agree(checked)

    def _until_all_are_ready(self) -> list[Any]:
        pause_s = _ALONE_S if self._exchange is None else _ROUND_S
        while True:
            begun = time.monotonic()
            said = self._agree(self._look)
            if all(answer is not None for answer in said):
                return said
            self._say_that_it_waits()
            time.sleep(max(0.0, begun + pause_s - time.monotonic()))

    # Introduce.

    def _introduce(self) -> Peer:
        self._options.check(self._member, on_mesh=self._exchange is not None)
        gpu = None if self._options.attaches else trainer_gpu(self._options.server_args, self._options.env)
        return {"host": host_identity(), "address": host_address(), "gpu": gpu, "rendezvous": free_port()}

    # Start.

    def _start(self, peers: list[Peer]) -> None:
        if self._options.attaches:
            self._say_what_is_ignored()
        elif self._member.leads_node:
            several_hosts_need_tcp([peer["host"] for peer in peers], self._options)
            self.fleet = Fleet(self._options.log_dir)
            url = self._start_server(self.fleet, peers)
            if self._member.rank == 0:
                self._start_sidecar(self.fleet, peers, url)
                self._url = self._options.seen_from_elsewhere(url, peers[0]["address"])
        elif (port := self._options.port()) is not None and self._exchange is None:
            self._url = f"http://127.0.0.1:{port}"

    def _say_what_is_ignored(self) -> None:
        if self._options.server_args and self._member.rank == 0:
            names = ", ".join(self._options.server_args)
            say(f"the server at {self._url} runs already, so these arguments of a server have no effect: {names}")

    def _start_server(self, fleet: Fleet, peers: list[Peer]) -> str:
        options, member = self._options, self._member
        config = EngineConfig(
            model_path=options.text("model_path") or "",
            log_path=fleet.log_folder / f"server-{member.node_rank}.log",
            tp_size=member.size,
            host=options.text("host") or "127.0.0.1",
            port=self._choose_port(fleet),
            args=(*to_argv(options.own_server_args), *self._node_args(peers)),
            env={**clean_environment(os.environ, fleet.temporary), **self._gpu_env(peers), **options.env},
            pythonpath=options.pythonpath,
            serves_http=member.rank == 0,
        )
        return fleet.start_server(config)

    def _choose_port(self, fleet: Fleet) -> int:
        port = self._options.port()
        if port is None or self._member.rank > 0:
            return fleet.claim_port(DEFAULT_PORT if self._member.rank == 0 else free_port())
        if not is_free(port):
            raise LaunchError(
                f"port {port} is in use: give port= another one, or server_url= and sidecar= to use what runs there"
            )
        return port

    def _node_args(self, peers: list[Peer]) -> list[str]:
        rendezvous = self._options.text("dist_init_addr")
        nodes = []
        if self._member.nnodes > 1:
            nodes = ["--nnodes", str(self._member.nnodes), "--node-rank", str(self._member.node_rank)]
            rendezvous = rendezvous or _rendezvous(peers)
        return [*nodes, *(["--dist-init-addr", rendezvous] if rendezvous else [])]

    def _gpu_env(self, peers: list[Peer]) -> dict[str, str | None]:
        """The server sees the GPUs of its own node's trainer ranks. Without a mesh, one rank knows its own alone."""
        mine = [peer["gpu"] for rank, peer in enumerate(peers) if self._member.node_of(rank) == self._member.node_rank]
        known = [gpu for gpu in mine if gpu]
        return gpu_environment(known) if len(known) == self._member.size // self._member.nnodes else {}

    def _start_sidecar(self, fleet: Fleet, peers: list[Peer], engine_url: str) -> None:
        options = self._options
        gpus = [peer["gpu"] for peer in peers if peer["gpu"]]
        matched = ("--gpu-uuids", ",".join(gpus)) if len(gpus) == self._member.size else ()
        listen = options.sidecar_listen or options.sidecar or fleet.socket
        self._target = options.sidecar or listen
        config = SidecarConfig(
            engine_url=engine_url,
            listen=listen,
            log_path=fleet.log_folder / "sidecar.log",
            args=(*matched, *options.sidecar_args),
            credentials=options.sidecar_credentials,
        )
        fleet.start_sidecar(config)

    # Wait.

    def _look(self) -> dict[str, Any] | None:
        """What to tell the others; None while there is something to wait for."""
        if self.fleet is not None:
            self.fleet.check_starting()
        others_look = self._member.rank > 0 and self._exchange is not None
        engine = None if others_look else self._facts_if_ready()
        if engine is None and not others_look:
            self._give_up_in_time()
            return None
        processes = self.fleet.facts() if self.fleet is not None else []
        return Ready(host=host_identity(), processes=processes, engine=engine).to_json()

    def _facts_if_ready(self) -> EngineFacts | None:
        assert self._target is not None, "checked with the options"
        if not self._server_is_ready():
            self._waits_for = "the SGLang server" if self.fleet is not None else f"the SGLang server at {self._url}"
            return None
        self._waits_for = f"the sidecar at {self._target}"
        # Another sidecar may answer there while ours is about to be refused its address.
        serving = sidecar_is_serving(self._target, credentials=self._options.sidecar_credentials)
        if not serving or not (self.fleet is None or self.fleet.sidecar_serves()):
            return None
        return self._facts(self._target)

    def _server_is_ready(self) -> bool:
        if self.fleet is not None and self.fleet.server is not None:
            return self.fleet.server.is_ready()
        return self._url is None or EngineClient(self._url).answers()

    def _facts(self, target: str) -> EngineFacts | None:
        try:
            with self._make_client(target) as client:
                status = client.status()
            frees, keeps = self._memory()
        except WeightSyncError as error:
            self._waits_for = f"an answer ({error})"
            return None
        if not status.HasField("engine"):
            return None
        self._check_engine(status.engine.unsupported_reason, status.engine.tp_size)
        return EngineFacts(
            sidecar=target,
            server_url=self._url,
            frees_memory=frees,
            keeps_weights=keeps,
            last_version=largest_version(status),
        )

    def _memory(self) -> tuple[bool, bool]:
        """A rank that cannot ask takes the worse for granted."""
        if self._url is None:
            return True, False
        return memory_facts(EngineClient(self._url).get("/server_info", _ANSWER_S))

    def _check_engine(self, unsupported: str, tp_size: int) -> None:
        if unsupported:
            raise LaunchError(f"this SGLang server cannot be updated: {unsupported}")
        if tp_size != self._member.size:
            raise LaunchError(f"the SGLang server has tp_size {tp_size}, the trainer {self._member.size} ranks")

    def _give_up_in_time(self) -> None:
        if time.monotonic() < self._begun + self._options.start_timeout:
            return
        if self.fleet is not None and self.fleet.server is not None:
            raise self.fleet.server.process.not_ready(self._options.start_timeout)
        raise LaunchError(f"{self._waits_for} was not ready within {self._options.start_timeout:g} s")

    def _say_that_it_waits(self) -> None:
        if (self.fleet is None and self._exchange is not None) or time.monotonic() < self._said + _SAY_S:
            return
        self._said = time.monotonic()
        processes = self.fleet.processes() if self.fleet is not None else []
        logs = ", ".join(str(process.log_path) for process in processes)
        say(f"waiting for {self._waits_for}, {self._said - self._begun:.0f} s{f' (log: {logs})' if logs else ''}")

    # Connect.

    def _connect(self, facts: EngineFacts) -> None:
        self.client = self._make_client(facts.sidecar)
        try:
            self.client.wait_ready(_CONNECT_S)
        except WeightSyncError as error:
            raise LaunchError(f"this rank does not reach the sidecar: {error}") from error


def _rendezvous(peers: list[Peer]) -> str:
    """Where the nodes of one server find each other: on loopback if it is all one host."""
    first = peers[0]
    one_host = all(peer["host"] == first["host"] for peer in peers)
    return f"{'127.0.0.1' if one_host else first['address']}:{first['rendezvous']}"
