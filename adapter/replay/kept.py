"""Buckets of GPU memory that stay mapped from update to update, and what was prepared for them.

Opening a mapping of 15 GiB takes milliseconds, and thousands of views tens of them. So a bucket that comes under a
lease (``adapter.lease``) stays here until its trainer asks for it back or is gone; a thread per lease waits for that in
the kernel. Host memory is not kept: opening it costs nothing, and its count could not tell any more who uses it.

Invariants: at most ``MOST`` buckets are kept, and what was kept once stays until its lease ends; nothing is let go
while a load is under way (``in_use``).
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from adapter.lease import KeptUnder
from adapter.replay.copies import Copies

logger = logging.getLogger(__name__)

MOST = 64
PREPARED_FOR = 64
"""Manifests whose copies stay prepared for one region: a staging buffer carries every second bucket of an update."""


@dataclass(slots=True, eq=False)
class Bucket:
    """One bucket's memory, kept or not."""

    flat: torch.Tensor
    """All of the region: uint8, one dimension. A bucket lies at its beginning."""
    copies: dict[str, Copies] = field(default_factory=dict)
    """Prepared, by the manifest's digest."""

    def remember(self, digest: str, copies: Copies) -> None:
        """For the next update with this manifest from this memory."""
        while len(self.copies) >= PREPARED_FOR:
            self.copies.pop(next(iter(self.copies)))
        self.copies[digest] = copies


class KeptBuckets:
    """All of one process."""

    def __init__(self, worth_keeping: Callable[[torch.Tensor], bool] = lambda flat: flat.is_cuda) -> None:
        self._worth_keeping = worth_keeping
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._buckets)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Nothing is let go meanwhile."""
        with self._lock:
            yield

    def get(self, lease: str) -> Bucket | None:
        """The bucket that is kept under this lease."""
        return self._buckets.get(lease)

    def keep(self, lease: str, flat: torch.Tensor) -> Bucket:
        """From now on, if it may be and can be. Within ``in_use``."""
        bucket = Bucket(flat)
        if not lease or not self._worth_keeping(flat) or len(self._buckets) >= MOST:
            return bucket
        try:
            under = KeptUnder(lease)
        except (OSError, ValueError) as error:
            logger.warning("a bucket cannot be kept mapped: %s", error)
            return bucket
        self._buckets[lease] = bucket
        waiting = threading.Thread(
            target=self._let_go_in_time, args=(under,), name=f"weight-sync-{lease[-8:]}", daemon=True
        )
        waiting.start()
        return bucket

    def forget(self, digest: str) -> None:
        """What was prepared for this manifest: its targets have moved. Within ``in_use``."""
        for bucket in self._buckets.values():
            bucket.copies.pop(digest, None)

    def _let_go_in_time(self, under: KeptUnder) -> None:
        under.wait_until_unwanted()
        with self._lock:
            bucket = self._buckets.pop(under.name, None)
            device = bucket.flat.device if bucket else None
            del bucket  # the last reference: closes the mapping
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        under.let_go()
