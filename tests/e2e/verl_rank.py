"""One rank of a trainer that owns a VerlEngine: an OS process of its own, told what to call.

    python -m tests.e2e.verl_rank --fd 5 --rank 0 --size 2 [--store FILE]

With a store it joins a gloo group and has a mesh. Takes commands as JSON from an inherited socket and answers each
with ``{"value": ...}`` or ``{"error": [kind, message]}``. Ends when the socket closes, engine and all.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from adapter import UpdateResult, WeightSyncError
from adapter.demo.tiny_model import random_weights
from adapter.verl_engine import VerlEngine

Command = dict[str, Any]


class Rank:
    """The engines of this rank, by name, and its mesh if it has one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tp_rank = options.rank
        self._engines: dict[str, VerlEngine] = {}
        self._where: dict[str, Any] = {"tp_rank": options.rank, "tp_size": options.size}
        if options.store:
            dist.init_process_group(
                "gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=options.size
            )
            self._where = {"device_mesh_cpu": init_device_mesh("cpu", (options.size,), mesh_dim_names=("tp",))["tp"]}

    @property
    def engine(self) -> VerlEngine:
        """The one without a name of its own."""
        return self._engines["engine"]

    def obey(self, command: Command) -> Any:
        """One command's result, as JSON has it."""
        name = command.get("engine", "engine")
        if command["do"] == "make":
            self._engines[name] = VerlEngine(**self._where, **command["arguments"])
            return self._description(self._engines[name])
        if command["do"] == "update":
            weights = random_weights(command["seed"])
            return asdict(self._engines[name].update_weights_from_tensor(weights, **command["arguments"]))
        return plain(getattr(self._engines[name], command["do"])(**command["arguments"]))

    @staticmethod
    def _description(engine: VerlEngine) -> dict[str, Any]:
        names = ("tp_rank", "tp_size", "server_url", "sidecar_target", "server_log", "sidecar_log")
        return {name: getattr(engine, name) for name in names}


def plain(result: Any) -> Any:
    """Streams as lists."""
    if isinstance(result, UpdateResult):
        return asdict(result)
    return list(result) if isinstance(result, Iterator) else result


def serve(kind: type[Rank]) -> int:
    """Serves commands until the socket closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--store")
    options = parser.parse_args()
    os.set_inheritable(options.fd, False)
    rank = kind(options)
    with Connection(options.fd) as commands:
        while True:
            try:
                command = json.loads(commands.recv_bytes())
            except EOFError:
                return 0
            commands.send_bytes(json.dumps(answer(rank, command)).encode())


def answer(rank: Rank, command: Command) -> dict[str, Any]:
    try:
        return {"value": rank.obey(command)}
    except (WeightSyncError, ValueError) as error:
        return {"error": [type(error).__name__, str(error)]}


if __name__ == "__main__":
    sys.exit(serve(Rank))
