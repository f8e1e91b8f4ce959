"""One trainer rank: an OS process of its own that knows nothing of its peers, of SGLang or of torch.distributed.

    python -m adapter.demo.trainer --fd 5 --target unix:/tmp/s.sock --rank 0 --tp-size 2

Takes commands as JSON messages from an inherited socket and answers each with one; ends when the socket closes. A
command {"seed": 1, "version": "v1", "timeout_s": 60} sends that seed's weights; "seed" stands for the training step
that a real trainer would have done. The first message of all is its own: it is ready. Invariant: every command is
answered, a failed update with its error.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from adapter import WeightSyncClient, WeightSyncError
from adapter.demo.tiny_model import random_weights


def main(argv: Sequence[str] | None = None) -> int:
    """Serves commands until the socket closes."""
    options = _parser().parse_args(argv)
    # torch's memory manager outlives this process and must not keep the socket open.
    os.set_inheritable(options.fd, False)
    with (
        Connection(options.fd) as commands,
        WeightSyncClient(
            options.target, rank=options.rank, tp_size=options.tp_size, bucket_bytes=options.bucket_bytes
        ) as client,
    ):
        commands.send_bytes(b'{"ready": true}')
        _serve(commands, client, options.device)
    return 0


def _serve(commands: "Connection[bytes, bytes]", client: WeightSyncClient, device: str) -> None:
    while True:
        try:
            command = json.loads(commands.recv_bytes())
        except EOFError:
            return
        commands.send_bytes(json.dumps(_update(client, command, device)).encode())


def _update(client: WeightSyncClient, command: dict[str, Any], device: str) -> dict[str, Any]:
    weights = random_weights(command["seed"], device)
    started = time.monotonic()
    try:
        result = client.update_weights(weights, version=command["version"], timeout=command["timeout_s"])
    except WeightSyncError as error:
        return {"error": str(error), "kind": type(error).__name__, "seconds": time.monotonic() - started}
    return {**asdict(result), "seconds": time.monotonic() - started}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket that commands come from")
    parser.add_argument("--target", required=True, help="where the sidecar listens")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--tp-size", type=int, required=True)
    parser.add_argument("--bucket-bytes", type=int, default=2 << 30)
    parser.add_argument("--device", default="cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
