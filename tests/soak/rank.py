"""One trainer rank of the soak: an OS process that sends what it is told to, and misbehaves where it is told to.

    python -m tests.soak.rank --fd 5 --target unix:/tmp/s.sock --rank 0 --tp-size 2

Takes commands as JSON messages from an inherited socket and answers each with one; the first message of all is its own:
it is ready. A command's "act" names what to do when the tensor of index "at" is asked for (the number of tensors: after
the last): "kill" and "stop" are real signals that the process sends itself, "raise" is a defect in the trainer's own
code, "reshape" gives that tensor another shape than the other ranks give it. Invariant: every command that is survived
is answered.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from adapter import WeightSyncClient, WeightSyncError
from adapter.planner import TensorSpec
from tests.soak.content import SHAPES, tensor

READY_TIMEOUT_S = 60.0


class DefectiveTrainerError(Exception):
    """What the act "raise" raises."""


def main() -> int:
    """Serve commands until the socket closes."""
    options = _parser().parse_args()
    # torch's memory manager outlives this process and must not keep the socket open.
    os.set_inheritable(options.fd, False)
    torch.set_num_threads(1)
    with (
        Connection(options.fd) as commands,
        WeightSyncClient(options.target, rank=options.rank, tp_size=options.tp_size) as client,
    ):
        commands.send_bytes(b'{"ready": true}')
        while (command := _next(commands)) is not None:
            commands.send_bytes(json.dumps(_update(client, command)).encode())
    return 0


def _next(commands: "Connection[bytes, bytes]") -> dict[str, Any] | None:
    try:
        command: dict[str, Any] = json.loads(commands.recv_bytes())
    except EOFError:
        return None
    return command


def _update(client: WeightSyncClient, command: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        client.wait_ready(READY_TIMEOUT_S)  # the sidecar may have been started again since the last one
        started = time.monotonic()
        report = _send(client, command)
    except (WeightSyncError, DefectiveTrainerError) as error:
        report = {"error": str(error), "kind": type(error).__name__, "reason": getattr(error, "reason", "")}
    return {**report, "seconds": time.monotonic() - started, "unreleased": client.unreleased_bytes}


def _send(client: WeightSyncClient, command: dict[str, Any]) -> dict[str, Any]:
    client.bucket_bytes = command["bucket_bytes"]
    result = client.update_weights(
        _tensors(command),
        specs=[TensorSpec(name, torch.bfloat16, shape) for name, shape in _shapes(command)],
        version=command["version"],
        verify=command["verify"],
        content_digest=command["content_digest"],
        allow_missing=command["allow_missing"],
        timeout=command["timeout_s"],
    )
    return {"posts": result.num_posts, "flushed": result.cache_flushed, "verified": result.verification}


def _shapes(command: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for index, name in enumerate(command["names"]):
        shape = SHAPES[name]
        reshaped = command["act"] == "reshape" and command["at"] == index
        yield name, tuple(torch.empty(shape).reshape(2, -1).shape) if reshaped else shape


def _tensors(command: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (name, shape) in enumerate(_shapes(command)):
        _act(command, index)
        yield name, tensor(name, command["seed"]).reshape(shape)
    _act(command, len(command["names"]))


def _act(command: dict[str, Any], index: int) -> None:
    if command["at"] != index:
        return
    if command["act"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif command["act"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif command["act"] == "raise":
        raise DefectiveTrainerError(f"before tensor {index}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket that commands come from")
    parser.add_argument("--target", required=True, help="where the sidecar listens")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--tp-size", type=int, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
