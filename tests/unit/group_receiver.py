"""One rank of a group that receives, as an engine's does: `python -m tests.unit.group_receiver PORT NAME RANK SIZES`.

Prints "joined", or "refused" if it could not, then each broadcast's bytes in hexadecimal, and "broken" in place of one
that did not come.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from adapter.process_group import join_group

WAIT = timedelta(seconds=60)


def main(port: int, name: str, rank: int, world_size: int, sizes: list[int]) -> None:
    try:
        store = dist.TCPStore("127.0.0.1", port, None, False, WAIT)  # type: ignore[attr-defined]
        group = join_group(store, name, rank, world_size, "gloo", WAIT)
    except RuntimeError:
        print("refused", flush=True)
        return
    print("joined", flush=True)
    for size in sizes:
        flat = torch.zeros(size, dtype=torch.uint8)
        try:
            group.broadcast(flat, root=0).wait()
        except RuntimeError:
            print("broken", flush=True)
            return
        print(flat.numpy().tobytes().hex(), flush=True)


if __name__ == "__main__":
    port, name, rank, world_size, *sizes = sys.argv[1:]
    main(int(port), name, int(rank), int(world_size), [int(size) for size in sizes])
