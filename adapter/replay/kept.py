"""Regions of GPU memory that stay mapped from update to update, and what was prepared for them.

Opening a mapping of 15 GiB takes milliseconds, and thousands of views tens of them. So a region that comes under a
lease (``adapter.lease``) stays here until its trainer asks for it back or is gone; a thread per lease waits for that in
the kernel. Host memory is not kept: opening it costs nothing, and its count could not tell any more who uses it.

Invariants: at most ``MOST`` regions are kept; what was kept once stays until its lease ends or the model itself holds
on to it; nothing is let go while a load is under way (``in_use``); a lease's lock goes only after the mapping has.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from adapter.lease import KeptUnder
from adapter.replay.copies import Copies
from adapter.replay.plan import Plan

logger = logging.getLogger(__name__)

MOST = 64


@dataclass(slots=True, eq=False)
class Region:
    """One region's memory, kept or not."""

    flat: torch.Tensor
    """All of it: uint8, one dimension. A bucket lies at its beginning."""
    copies: WeakKeyDictionary[Plan, Copies] = field(default_factory=WeakKeyDictionary)
    """Prepared, for plans that are still followed."""
    ready: tuple[bytes, torch.cuda.Event] | None = None
    """The trainer's event that was waited for last, opened."""

    def wait_for(self, event: bytes) -> None:
        """Return when the bytes are there, as the trainer's event says; empty: they are."""
        if not event:
            return
        if self.ready is None or self.ready[0] != event:
            opened: torch.cuda.Event = torch.cuda.Event.from_ipc_handle(self.flat.device, event)  # type: ignore[no-untyped-call]
            self.ready = event, opened
        self.ready[1].synchronize()


class KeptRegions:
    """All of one process."""

    def __init__(self, worth_keeping: Callable[[torch.Tensor], bool] = lambda flat: flat.is_cuda) -> None:
        self._worth_keeping = worth_keeping
        self._kept: dict[str, tuple[Region, KeptUnder]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Nothing is let go meanwhile."""
        with self._lock:
            yield

    def get(self, lease: str) -> Region | None:
        """The region that is kept under this lease."""
        kept = self._kept.get(lease)
        return kept[0] if kept else None

    def keep(self, lease: str, flat: torch.Tensor) -> Region:
        """From now on, if it may be and can be. Within ``in_use``."""
        region = Region(flat)
        if not lease or not self._worth_keeping(flat) or len(self._kept) >= MOST:
            return region
        try:
            under = KeptUnder(lease)
        except (OSError, ValueError) as error:
            logger.warning("a region cannot be kept mapped: %s", error)
            return region
        self._kept[lease] = region, under
        threading.Thread(
            target=self._let_go_in_time, args=(under,), name=f"weight-sync-{lease[-8:]}", daemon=True
        ).start()
        return region

    def give_up(self, lease: str) -> None:
        """Leave the memory to whoever else in this process holds it: its own count tells when. Within ``in_use``."""
        kept = self._kept.pop(lease, None)
        if kept is not None:
            kept[1].let_go()

    def _let_go_in_time(self, under: KeptUnder) -> None:
        """In a thread of its own."""
        try:
            under.wait_until_unwanted()
            with self._lock:
                self._kept.pop(under.name, None)  # the last reference: closes the mapping
        except OSError:  # it was given up
            logger.debug("the lease %s is not waited for any more", under.name)
        finally:
            under.let_go()
