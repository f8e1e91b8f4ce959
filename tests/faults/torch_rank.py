"""One real trainer rank: torch, the adapter's client, and weights that follow from a seed.

    python -m tests.faults.torch_rank --fd 5 --target unix:/tmp/s.sock --rank 1 --tp-size 2

Speaks as ``tests.faults.rank`` does: {"do": "update", ...RealJob} -> {"event": "done", "saw": ..., ...}, where ``saw``
is "" or the kind of the error. Invariant: every update ends with one "done".
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from adapter import WeightSyncClient, WeightSyncError
from adapter.demo.tiny_model import random_weights

BUCKET_BYTES = 800_000
"""The tiny model has 1.4 MB, so it takes two buckets."""

READY_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RealJob:
    """One update, from one rank."""

    seed: int
    version: str
    verify: bool = False
    timeout_s: float = 40.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serves commands until the socket closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--tp-size", type=int, required=True)
    options = parser.parse_args(argv)
    os.set_inheritable(options.fd, False)  # torch's memory manager outlives this process
    with (
        Connection(options.fd) as commands,
        WeightSyncClient(
            options.target, rank=options.rank, tp_size=options.tp_size, bucket_bytes=BUCKET_BYTES
        ) as client,
    ):
        commands.send_bytes(b'{"event": "ready"}')
        _serve(commands, client)
    return 0


def _serve(commands: "Connection[bytes, bytes]", client: WeightSyncClient) -> None:
    while True:
        try:
            command = json.loads(commands.recv_bytes())
        except EOFError:
            return
        command.pop("do")
        done = _update(client, RealJob(**command))
        commands.send_bytes(json.dumps({"event": "done", **done}).encode())


def _update(client: WeightSyncClient, job: RealJob) -> dict[str, Any]:
    saw = error = ""
    try:
        client.wait_ready(READY_S)  # a sidecar that was started again
        client.update_weights(random_weights(job.seed), version=job.version, verify=job.verify, timeout=job.timeout_s)
    except WeightSyncError as failure:
        saw, error = type(failure).__name__, str(failure)
    return {"saw": saw, "error": error, "unreleased_bytes": client.unreleased_bytes}


if __name__ == "__main__":
    sys.exit(main())
