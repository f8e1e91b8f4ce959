"""A fleet under Ray: a trainer's actors bring their versions into engine actors, of which one dies and is replaced.

    python examples/ray_fleet.py --engines 2

Every engine actor starts a real SGLang server and its sidecar; the trainer asks the actors where their sidecars listen,
so a fleet is whoever is there when an update begins. A seed stands for what a training step makes of the tiny model.
Shown: after each update all engines say the same, of that version and not what they said before; an engine that dies is
done without; and the one that takes its place serves nothing of ours until it has caught up. On the CPU of this host,
or on a cluster with GPUs; there sidecars are reached over the network, and their files must be on every node:

    python examples/ray_fleet.py --address auto --strategy SPREAD --engines 8 --gpus-per-engine 2 --gpus-per-trainer 1
        --tls-certificate tls.crt --tls-key tls.key --ca ca.crt --server-name sidecars --token-file token
"""

import argparse
import contextlib
import logging
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adapter import Credentials, GenerateClient
from adapter.demo.cpu_engine import cpu_engine, cuda_engine
from adapter.demo.tiny_model import random_weights, write_config
from adapter.fleet import Asked, Fleet
from adapter.launch import EngineProcess, ProcessFacts, ReaperProcess, SidecarConfig, SidecarProcess
from adapter.sources import NamedTensors

PROMPT, NUM_TOKENS = [5, 8, 11], 8
NAMESPACE = "ray-fleet"  # of the actors' names, where several jobs share a cluster
START_S, UPDATE_S, ANSWER_S, END_S = 600.0, 120.0, 10.0, 60.0
LOOPBACK = "127.0.0.1"
OBJECT_STORE = 80 << 20  # bytes, nearly Ray's least: no weights pass through it

# Ray would end a dying worker's children, the reaper first of all, and leave the server's own children and memory.
LET_THE_REAPER_LIVE = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}
Actor = Any  # Ray's handles have whatever methods the class has


class Said(NamedTuple):
    """One engine's answer."""

    version: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What stands before the sidecars, which whoever reaches them can change weights with. Paths are of every node."""

    tls_certificate: Path | None
    tls_key: Path | None
    ca: Path | None
    server_name: str
    token_file: Path | None
    insecure: bool
    host: str
    """Where they listen; empty: at their nodes' addresses."""

    def credentials(self) -> Credentials:
        """How this process shows that it may."""
        return Credentials(ca=self.ca, server_name=self.server_name, token_file=self.token_file)

    def arguments(self) -> tuple[str, ...]:
        """The sidecar's."""
        flags = {"certificate": self.tls_certificate, "key": self.tls_key}
        tls = [f"--tls-{name}={path}" for name, path in flags.items() if path]
        token = [f"--update-token-file={self.token_file}"] if self.token_file else []
        return (*tls, *token, *(["--insecure"] if self.insecure else []))


class EngineActor:
    """A server and its sidecar. If this actor is killed, the reaper ends both."""

    def __init__(self, gpus: int, guard: Guard, before: Sequence[ProcessFacts]) -> None:
        """``before``: of an actor that was here, whose GPUs are free once these have ended."""
        _until(lambda: all(process.has_ended() for process in before), END_S, "the last engine to end")
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-fleet-engine-")))
            reaper = stack.enter_context(ReaperProcess(folder / "reaper.log"))
            reaper.remove(folder)
            make_config, tp_size = (cuda_engine, gpus) if gpus else (cpu_engine, 1)
            config = make_config(folder, write_config(folder / "model"), tp_size=tp_size)
            engine = stack.enter_context(EngineProcess(replace(config, ready_timeout_s=START_S), reaper=reaper))
            beside = SidecarConfig(
                engine_url=engine.url,  # on loopback: what is generated passes through this actor
                listen=_free_address(guard.host),
                log_path=folder / "sidecar.log",
                args=("--require-update", f"--journal={folder}/sidecar.journal", *guard.arguments()),
                credentials=guard.credentials(),
            )
            sidecar = stack.enter_context(SidecarProcess(beside, reaper=reaper))
            self._processes = [engine.process.facts, sidecar.process.facts]
            self._target, self._server = beside.listen, GenerateClient(engine.url)
            self._running = stack.pop_all()

    def target(self) -> str:
        """Where its sidecar listens."""
        return self._target

    def processes(self) -> list[ProcessFacts]:
        """What a successor on this node waits for."""
        return self._processes

    def say(self) -> Said:
        """Greedy tokens after the prompt."""
        sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        answer = self._server.generate(input_ids=PROMPT, sampling_params=sampling)
        return Said(answer.weight_version, answer.output_ids)

    def close(self) -> None:
        """End both, in order."""
        self._running.close()


class TrainerActor:
    """One rank of the trainer; rank 0 has the fleet, and the others send their shards to it."""

    def __init__(self, rank: int, ranks: int, names: Sequence[str], guard: Guard) -> None:
        self._rank, self._ranks = rank, ranks
        discovery = Asked(lambda: sidecars(names) if rank == 0 else [])
        self._fleet = Fleet(discovery, credentials=guard.credentials())
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def address(self) -> str:
        """Where the ranks can meet."""
        return _free_address()

    def meet(self, address: str) -> None:
        """Join the trainer's own group, which the fleet's has nothing to do with."""
        backend = "cpu:gloo,cuda:nccl" if self._device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=self._rank, world_size=self._ranks)

    def update(self, version: int) -> str:
        """One training step, and its weights into every engine; rank 0 says what came of it."""
        weights = self._weights(version)
        if self._rank:
            self._fleet.take_part(weights)
            return ""
        result = self._fleet.update_weights(weights, version=str(version), timeout=UPDATE_S)
        return f"{len(result.published)} engines, {result.num_bytes} bytes in {sum(result.seconds.values()):.2f} s"

    def catch_up(self, version: int) -> str:
        """Bring the fleet's version to whoever lacks it."""
        weights = self._weights(version)
        if self._rank:
            self._fleet.take_part(weights)
            return ""
        result = self._fleet.catch_up(weights, timeout=UPDATE_S)
        return f"{len(result.published)} of {len(result.engines)}" if result else "nobody lacked it"

    def _weights(self, seed: int) -> NamedTensors:
        """Whole, or this rank's shards of them."""
        whole = random_weights(seed, self._device)
        if self._ranks == 1:
            return whole
        mesh = init_device_mesh(self._device, (self._ranks,))
        return [(name, distribute_tensor(tensor, mesh, [Shard(0)])) for name, tensor in whole]

    def close(self) -> None:
        """Have the engines leave the group."""
        self._fleet.close()
        if self._ranks > 1:
            dist.destroy_process_group()


def sidecars(names: Sequence[str]) -> list[str]:
    """Where the sidecars of those engine actors listen that are there; one that is being started is not there yet."""
    asked: list[Any] = []
    for name in names:
        with contextlib.suppress(ValueError):  # there is none of that name just now
            asked.append(ray.get_actor(name, namespace=NAMESPACE).target.remote())
    targets = []
    for answer in ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)[0] if asked else []:
        with contextlib.suppress(ray.exceptions.RayActorError):  # it has just died
            targets.append(ray.get(answer))
    return targets


class Run:
    """The driver's view of it."""

    def __init__(self, options: argparse.Namespace, guard: Guard) -> None:
        self._options, self._guard = options, guard
        self._names = [f"engine-{number}" for number in range(options.engines)]
        self._group = _placed(options)
        self._engines = {name: self._start(number, []) for number, name in enumerate(self._names)}
        self._trainers = [self._start_trainer(rank) for rank in range(options.trainers)]
        self._processes = {name: ray.get(engine.processes.remote()) for name, engine in self._engines.items()}
        if options.trainers > 1:
            address = ray.get(self._trainers[0].address.remote())
            self._on_all_ranks("meet", address)

    def _start(self, number: int, before: Sequence[ProcessFacts]) -> Actor:
        options = self._options
        needs = {"num_cpus": options.cpus_per_engine, "num_gpus": options.gpus_per_engine, "name": self._names[number]}
        placed = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        actor: Actor = ray.remote(EngineActor).options(
            **needs, scheduling_strategy=placed, runtime_env=LET_THE_REAPER_LIVE
        )
        return actor.remote(options.gpus_per_engine, self._guard, before)

    def _start_trainer(self, rank: int) -> Actor:
        options = self._options
        bundle = options.engines + rank
        placed = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        needs = {"num_cpus": 1, "num_gpus": options.gpus_per_trainer}
        actor: Actor = ray.remote(TrainerActor).options(**needs, scheduling_strategy=placed)
        return actor.remote(rank, options.trainers, self._names, self._guard)

    def _on_all_ranks(self, method: str, *arguments: object) -> str:
        """What rank 0 says."""
        calls = [getattr(trainer, method).remote(*arguments) for trainer in self._trainers]
        answers: list[str] = ray.get(calls, timeout=START_S)
        return answers[0]

    def updates(self, versions: Sequence[int]) -> None:
        """After each of them every engine answers with it."""
        before = None
        for version in versions:
            print(f"version {version}: {self._on_all_ranks('update', version)}", flush=True)
            said = self.all_say(str(version))
            assert said != before, "the answer is that of the version before"
            before = said

    def all_say(self, version: str) -> tuple[int, ...]:
        """The tokens of every engine, which must be the same, and of this version."""
        said: dict[str, Said] = {name: ray.get(engine.say.remote()) for name, engine in self._engines.items()}
        for name, answer in said.items():
            print(f"  {name} serves version {answer.version} and says {' '.join(map(str, answer.tokens))}", flush=True)
        assert {answer.version for answer in said.values()} == {version}
        (tokens,) = {answer.tokens for answer in said.values()}
        return tokens

    def kill(self, number: int) -> None:
        """As a node's failure would; what it ran is ended by its reaper."""
        name = self._names[number]
        ray.kill(self._engines.pop(name))
        _until(lambda: name not in _actors(), END_S, f"{name} to be gone")
        print(f"{name} was killed", flush=True)

    def replace(self, number: int) -> None:
        """Another actor in the same bundle; it serves its checkpoint, which is not ours."""
        name = self._names[number]
        self._engines[name] = self._start(number, self._processes[name])
        self._processes[name] = ray.get(self._engines[name].processes.remote())
        print(
            f"{name} was replaced, and serves version {ray.get(self._engines[name].say.remote()).version}", flush=True
        )

    def catch_up(self, version: int) -> None:
        """Nobody has another version then."""
        print(f"caught up with version {version}: {self._on_all_ranks('catch_up', version)}", flush=True)
        self.all_say(str(version))

    def close(self) -> None:
        """End everything in order."""
        for actors in (self._trainers, self._engines.values()):  # the trainer first: its engines are told to leave
            ray.get([actor.close.remote() for actor in actors], timeout=END_S)
        ray.util.remove_placement_group(self._group)


def _placed(options: argparse.Namespace) -> PlacementGroup:
    """A bundle for each engine, then one for each rank of the trainer."""
    engine = {"CPU": float(options.cpus_per_engine), "GPU": float(options.gpus_per_engine)}
    trainer = {"CPU": 1.0, "GPU": float(options.gpus_per_trainer)}
    bundles = [engine] * options.engines + [trainer] * options.trainers
    group: PlacementGroup = placement_group(
        [{kind: n for kind, n in one.items() if n} for one in bundles], strategy=options.strategy
    )
    ray.get(group.ready(), timeout=START_S)
    return group


def _actors() -> list[str]:
    """Names that are in use."""
    found: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


def _free_address(host: str = "") -> str:
    """A port of this node, whose address is known to Ray."""
    host = host or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _until(is_so: Any, seconds: float, what: str) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def cluster(options: argparse.Namespace) -> Iterator[None]:
    """The one that is named, or one of this host alone, that ends with the block."""
    with tempfile.TemporaryDirectory(prefix="ray-fleet-") as folder:  # short: Ray's sockets lie below it
        if options.address:
            ray.init(options.address, namespace=NAMESPACE, logging_level=logging.WARNING)
        else:
            ray.init(
                num_cpus=options.engines * options.cpus_per_engine + options.trainers,
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                namespace=NAMESPACE,
                logging_level=logging.WARNING,
                _temp_dir=folder,
            )
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            yield
        finally:
            ray.shutdown()


def arguments() -> tuple[argparse.Namespace, Guard]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--trainers", type=int, default=1, help="ranks, each with its shards of the weights")
    parser.add_argument("--address", default="", help="of a Ray cluster; empty: a new one on this host's CPUs or GPUs")
    parser.add_argument("--strategy", default="PACK", help="of the placement group")
    parser.add_argument("--cpus-per-engine", type=int, default=1)
    parser.add_argument("--gpus-per-engine", type=int, default=0, help="its TP ranks; 0: on the CPU")
    parser.add_argument("--gpus-per-trainer", type=int, default=0)
    guard = parser.add_argument_group(
        "what guards the sidecars, which listen at --host, else at their nodes' addresses"
    )
    for name in ("tls-certificate", "tls-key", "ca", "token-file"):
        guard.add_argument(f"--{name}", type=Path)
    guard.add_argument("--server-name", default="", help="in the certificate, if that is not of the nodes' addresses")
    guard.add_argument(
        "--insecure", action="store_true", help="nothing: every host that reaches them may change weights"
    )
    guard.add_argument("--host", default="", help="without --address 127.0.0.1, which needs no guard")
    options = parser.parse_args()
    options.host = options.host or ("" if options.address else LOOPBACK)
    return options, Guard(**{name: getattr(options, name) for name in Guard.__slots__})


def main() -> None:
    """Updates, a death, a successor."""
    options, guard = arguments()
    last = options.updates + 1
    with cluster(options):  # its end kills whoever is left, if something failed
        run = Run(options, guard)
        run.updates(range(1, last))
        run.kill(options.engines - 1)
        run.updates([last])
        run.replace(options.engines - 1)
        run.catch_up(last)
        run.close()
    print(f"{options.engines} engines serve version {last}.")


if __name__ == "__main__":
    main()
