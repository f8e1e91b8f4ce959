"""One torch.distributed group beside the trainer's own: this process as rank 0, engines' ranks as the others.

Runs in the trainer, with torch alone. Invariants: the trainer's default group is neither needed nor touched; every wait
here is bounded; and a group that broke is never used again. Facts borrowed: SGLang joins by torch's own
``_new_process_group_helper`` with a ``PrefixStore`` of the group's name (0.5.15.post1 to 0.5.23,
srt/utils/common.py ``init_custom_process_group``), so the same is done here, or the keys of the two would not meet.
With gloo, dropping the group closes its connections, which ends what the others wait for; an operation that is under
way keeps them open until it ends or times out (run with torch 2.14). NCCL makes its connections in the first broadcast,
inside a call that nothing ends if a peer has failed meanwhile (run with torch 2.11 and NCCL 2.28 on two GPUs): so all
broadcasts are begun by a thread of the group's own, which is left behind if need be.
Who comes to a store that is gone tries again for all of its time, and SGLang's schedulers give it 30 minutes, during
which they do nothing else; who is let in and then cut off is told at once (run with torch 2.14 and gloo). So a store
whose group is given up turns members away (``turn_away``) until the last has come.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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

# Both ends of a connection must agree on it, and SGLang sets it for its processes (0.5.15.post1 to 0.5.23,
# srt/entrypoints/engine.py). Read by NCCL once per process: one that has used NCCL before must have it from the start.
AS_SGLANG_DOES = "NCCL_CUMEM_ENABLE", "0"
WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
POLL_S = 0.0005
CLOSE_PATIENCE_S = 5.0
HERE = "127.0.0.1"
OPEN_S, CLOSED_S = 0.5, 0.1
"""How long a store that turns members away lets them in before it cuts them off, and how long it is shut then."""


class Sent:
    """One broadcast under way; keeps its memory."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat
        self._stream = torch.cuda.current_stream(flat.device) if flat.is_cuda else None
        self._begun = threading.Event()
        self._work: dist.Work | None = None
        self._problem: Exception | None = None

    def begin(self, group: dist.ProcessGroup) -> None:
        """Send, behind what the thread that made this had asked its GPU to do by then."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._work = group.broadcast([self.flat], options)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: whoever waits must be told
            self._problem = error
        finally:
            self._begun.set()

    def done(self) -> bool:
        """Whether every receiver has it, or it failed."""
        return self._begun.is_set() and (self._work is None or bool(self._work.is_completed()))

    def let_go(self) -> None:
        """Keep the operation no longer: with gloo, connections stay open as long as somebody does."""
        self._work = None

    def check(self) -> None:
        """Raise ``GroupBroken`` if it failed; called once it is done."""
        if self._problem is not None:
            raise GroupBroken(f"the broadcast did not begin: {_first_line(self._problem)}") from self._problem
        try:
            if self._work is not None:
                self._work.wait()
        except RuntimeError as error:
            raise GroupBroken(f"a receiver of the broadcast is gone: {_first_line(error)}") from error


class BroadcastGroup:
    """A group from its store's opening (the constructor) over ``join`` to ``close``.

    Used by one thread, but for ``join``, which may run in another one while this one closes.
    """

    def __init__(self, name: str, world_size: int, backend: str, join_s: float, timeout_s: float) -> None:
        """Serve the group's store at a port that the system chooses, on every address of this host.

        ``join_s``: how long joining may take. ``timeout_s``: how long each broadcast may.
        """
        self.name = name
        self.world_size = world_size
        self.backend = backend
        self._join_timeout = timedelta(seconds=join_s)
        self._timeout = timedelta(seconds=timeout_s)
        self._store: Any = _store(0, join_s, serve=True)
        self.port = int(self._store.port)
        self._group: dist.ProcessGroup | None = None
        self._closing = threading.Lock()
        self._to_begin: queue.SimpleQueue[Sent | None] = queue.SimpleQueue()
        self._open: list[Sent] = []

    def join(self) -> None:
        """Return once all members have joined; raises ``GroupBroken``."""
        try:
            # As a client like the others: what this thread held of the store itself would keep it open after ``close``.
            store = _store(self.port, self._join_timeout.total_seconds())
            with _as_nccl_must_be() if self.backend == "nccl" else nullcontext():
                group = join_group(store, self.name, 0, self.world_size, self.backend, self._join_timeout)
        except RuntimeError as error:  # torch.distributed's errors are some
            raise GroupBroken(f"not all members joined group {self.name}: {_first_line(error)}") from error
        if self.backend == "gloo":
            group._get_backend(torch.device("cpu"))._set_default_timeout(self._timeout)
        with self._closing:
            closed = self._store is None  # meanwhile, by another thread
            self._group = None if closed else group
        if closed:
            _close(group, None, self.backend == "nccl")
            raise GroupBroken(f"group {self.name} was given up")
        threading.Thread(
            target=_begin_all, args=(group, self._to_begin), name=f"broadcast {self.name}", daemon=True
        ).start()

    def broadcast(self, flat: torch.Tensor) -> Sent:
        """Begin to send ``flat`` (contiguous) from here to all others, in the order of the calls."""
        assert self._group is not None, "it is joined first"
        sent = Sent(flat)
        self._open = [one for one in self._open if not one.done()] + [sent]
        self._to_begin.put(sent)
        return sent

    def close(self) -> None:
        """Close the connections and the store; what is under way is left to a thread of its own, which it ends with."""
        with self._closing:
            group, store, self._group, self._store = self._group, self._store, None, None
        if store is None:
            return
        self._to_begin.put(None)
        for sent in self._open:
            sent.let_go()
        arguments = (group, store, self.backend == "nccl")
        closing = threading.Thread(target=_close, args=arguments, name=f"close {self.name}", daemon=True)
        del arguments
        del group, store
        closing.start()
        closing.join(CLOSE_PATIENCE_S)

    def turn_away(self, over: Callable[[], bool], seconds: float) -> None:
        """After ``close``: a thread tells whoever still comes to join, until ``over`` or for ``seconds``."""
        arguments = (self.port, over, time.monotonic() + seconds)
        threading.Thread(target=_turn_away, args=arguments, name=f"turn away {self.name}").start()


def join_group(
    store: Any, name: str, rank: int, world_size: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Become ``rank`` of the group, as SGLang's ranks do; raises ``RuntimeError``."""
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=cast("Any", name),  # newer torch has a type of its own for it
        timeout=timeout,
    )
    assert isinstance(group, dist.ProcessGroup), "this process is a member"
    _world.pg_group_ranks[group] = {member: member for member in range(world_size)}  # for destroy_process_group
    return group


def wait_all(sent: list[Sent], give_up: float) -> None:
    """Until all are done, or ``give_up`` on the monotonic clock; raises ``GroupBroken``."""
    for one in sent:
        while not one.done():
            if time.monotonic() > give_up:
                raise GroupBroken("a broadcast has not ended in time")
            time.sleep(POLL_S)
        one.check()


def _store(port: int, seconds: float, *, serve: bool = False) -> Any:
    """The store, or a connection to it; ``seconds``: for everything that is asked of it."""
    return dist.TCPStore(HERE, port, None, serve, timedelta(seconds=seconds), wait_for_workers=False)  # type: ignore[attr-defined]


def _turn_away(port: int, over: Callable[[], bool], give_up: float) -> None:
    """No daemon, which might be ended inside of torch at exit; so it looks for that itself."""
    while not over() and time.monotonic() < give_up and threading.main_thread().is_alive():
        try:
            store = _store(port, OPEN_S, serve=True)
            time.sleep(OPEN_S)
            del store
        except RuntimeError as error:  # the port is not free yet, or no longer ours
            logger.debug("port %d cannot be opened: %s", port, _first_line(error))
        time.sleep(CLOSED_S)


@contextmanager
def _as_nccl_must_be() -> Iterator[None]:
    """While a group is made: torch's watchdog must not end the trainer for an engine that has gone."""
    os.environ.setdefault(*AS_SGLANG_DOES)
    before = os.environ.get(WATCHDOG)
    os.environ[WATCHDOG] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WATCHDOG]
        else:
            os.environ[WATCHDOG] = before


def _begin_all(group: dist.ProcessGroup, to_begin: queue.SimpleQueue[Sent | None]) -> None:
    while (sent := to_begin.get()) is not None:
        sent.begin(group)


def _close(group: dist.ProcessGroup | None, store: Any, must_abort: bool) -> None:
    try:
        if group is not None and must_abort:
            group.abort()
        if group is not None:
            dist.destroy_process_group(group)
    except (RuntimeError, ValueError, KeyError) as error:  # it is dropped in any case
        logger.debug("a group did not end in order: %s", error)
    del group, store


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
