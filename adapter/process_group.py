"""One torch.distributed group beside the trainer's own: this process as rank 0, engines' ranks as the others.

Runs in the trainer, with torch alone. Invariants: the trainer's default group is neither needed nor touched; every wait
here is bounded; and a group that broke is never used again. Facts borrowed: SGLang joins by torch's own
``_new_process_group_helper`` with a ``PrefixStore`` of the group's name (0.5.15.post1 to 0.5.23,
srt/utils/common.py ``init_custom_process_group``), so the same is done here, or the keys of the two would not meet.
With gloo, dropping the group closes its connections, which ends what the others wait for; an operation that is under
way keeps them open until it ends or times out (run with torch 2.14). NCCL's is aborted.
"""

import logging
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from adapter.errors import GroupBroken

logger = logging.getLogger(__name__)

POLL_S = 0.0005
CLOSE_PATIENCE_S = 5.0


@dataclass(slots=True)
class Sent:
    """One broadcast under way; keeps its memory."""

    flat: torch.Tensor
    _work: dist.Work

    def done(self) -> bool:
        """Whether every receiver has it, or it failed."""
        return bool(self._work.is_completed())

    def check(self) -> None:
        """Raise ``GroupBroken`` if it failed; called once it is done."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise GroupBroken(f"a receiver of the broadcast is gone: {_first_line(error)}") from error


class BroadcastGroup:
    """A group from its store's opening (the constructor) over ``join`` to ``close``; used by one thread."""

    def __init__(self, name: str, world_size: int, backend: str, timeout_s: float) -> None:
        """Serve the group's store at a port that the system chooses, on every address of this host.

        ``timeout_s``: how long joining, and each broadcast, may take.
        """
        self.name = name
        self.world_size = world_size
        self.backend = backend
        self._timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore("127.0.0.1", 0, None, True, self._timeout, wait_for_workers=False)  # type: ignore[attr-defined]
        self._store: Any = store
        self.port = int(self._store.port)
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Return once all members have joined; raises ``GroupBroken``."""
        try:
            group, _ = _new_process_group_helper(
                self.world_size,
                0,
                [],
                Backend(self.backend),
                PrefixStore(self.name, self._store),
                group_name=cast("Any", self.name),  # newer torch has a type of its own for it
                timeout=self._timeout,
            )
        except RuntimeError as error:  # torch.distributed's errors are some
            raise GroupBroken(f"not all members joined group {self.name}: {_first_line(error)}") from error
        assert isinstance(group, dist.ProcessGroup), "this process is a member"
        _world.pg_group_ranks[group] = {rank: rank for rank in range(self.world_size)}  # for destroy_process_group
        self._group = group

    def broadcast(self, flat: torch.Tensor) -> Sent:
        """Begin to send ``flat`` (contiguous) from here to all others, in the order of the calls."""
        assert self._group is not None, "it is joined first"
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            return Sent(flat, self._group.broadcast([flat], options))
        except RuntimeError as error:
            raise GroupBroken(f"the broadcast cannot begin: {_first_line(error)}") from error

    def close(self) -> None:
        """Close the connections and the store; what is under way is left to a thread of its own, which it ends with."""
        group, store, self._group, self._store = self._group, self._store, None, None
        if store is None:
            return
        if group is not None and self.backend == "nccl":
            group.abort()
        closing = threading.Thread(target=_close, args=(group, store), name=f"close {self.name}", daemon=True)
        del group, store
        closing.start()
        closing.join(CLOSE_PATIENCE_S)


def wait_all(sent: list[Sent], give_up: float) -> None:
    """Until all are done, or ``give_up`` on the monotonic clock; raises ``GroupBroken``."""
    for one in sent:
        while not one.done():
            if time.monotonic() > give_up:
                raise GroupBroken("a broadcast has not ended in time")
            time.sleep(POLL_S)
        one.check()


def _close(group: dist.ProcessGroup | None, store: Any) -> None:
    try:
        if group is not None:
            dist.destroy_process_group(group)
    except (RuntimeError, ValueError, KeyError) as error:  # it is dropped in any case
        logger.debug("a group did not end in order: %s", error)
    del group, store


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
