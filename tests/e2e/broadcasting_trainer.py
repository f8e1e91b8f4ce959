"""A trainer that is killed in the middle of a broadcast: `python -m tests.e2e.broadcasting_trainer TARGET VERSION`.

Invariant: it says "half" on its standard output once the first bucket has gone and the second has not, and then waits
for its end.
"""

import sys
import time

import torch

from adapter.demo import tiny_model
from adapter.fleet import Fleet
from adapter.process_group import BroadcastGroup, Sent
from tests.e2e.engines import SMALL_BUCKET_BYTES


class HalfGroup(BroadcastGroup):
    """Sends one bucket, and no more."""

    _sent = False

    def broadcast(self, flat: torch.Tensor) -> Sent:
        """The first as ever; at the second, wait."""
        if self._sent:
            print("half", flush=True)
            time.sleep(600)
        self._sent = True
        return super().broadcast(flat)


def main() -> None:
    """Begin one update."""
    target, version = sys.argv[1:]
    with Fleet([target], bucket_bytes=SMALL_BUCKET_BYTES, staging_buffers=1, make_group=HalfGroup) as fleet:
        fleet.update_weights(tiny_model.random_weights(7), version=version)


if __name__ == "__main__":
    main()
