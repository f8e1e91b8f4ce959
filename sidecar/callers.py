"""Who waits for an update: one rank may have several calls open, and its memory goes with the last of them.

Invariant: ``gone`` is called once per rank and bucket, when the last call for it is cancelled, which is also how the
death of the caller's process or a cut connection is seen here.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WHOLE_UPDATE = -1
"""In place of a bucket: a call that stands for all of a rank's memory."""

Gone = Callable[[], None]


class Callers:
    """Open calls by update, rank and bucket."""

    def __init__(self) -> None:
        self._open: Counter[tuple[str, int, int]] = Counter()

    @contextmanager
    def calling(self, update_id: str, rank: int, bucket: int, gone: Gone) -> Iterator[None]:
        """Count one call for as long as it is open."""
        key = (update_id, rank, bucket)
        self._open[key] += 1
        try:
            yield
        except asyncio.CancelledError:
            if self._open[key] == 1:
                gone()
            raise
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]
