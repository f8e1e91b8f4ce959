"""Looks at the file system and the network that may hang, each in a thread with a limit.

Invariant: a look that hangs is left behind, and does not keep the process from ending.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T], timeout_s: float) -> T:
    """What ``work`` returns or raises; raises ``TimeoutError`` where it takes longer."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    threading.Thread(target=_carry, args=(work, future), name="doctor", daemon=True).start()
    return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)


def _carry(work: Callable[[], T], future: "concurrent.futures.Future[T]") -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # nobody waits any more
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - carried to the one that waits
            future.set_exception(error)
