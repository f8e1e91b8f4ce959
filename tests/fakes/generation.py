"""Requests in flight, what a pause does to them, and which calls wait for them.

    retract    running -> waiting; they come back at continue
    in_place   stay running, frozen
    abort      end; the scheduler itself is not paused, only new requests wait

Invariant: ``running`` and ``waiting`` count every request in flight, those that a test made up by setting
``running`` and those of clients inside ``decode``.
"""

import threading
import time
from collections.abc import Callable

from tests.fakes.calls import Call
from tests.fakes.faults import EngineDied

_NEED_WRITER_LOCK = (
    "/begin_weight_update",
    "/end_weight_update",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/update_weights_from_disk",
)


class Generation:
    """The request side of one engine life; safe to use from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._aborts = 0
        self._dead = False
        self.running = 0
        self.waiting = 0
        self.num_aborted = 0
        self.paused = False
        self.scheduler_paused = False

    def set_running(self, number: int) -> None:
        with self._changed:
            self.running = number
            self._changed.notify_all()

    def pause(self, mode: str) -> None:
        with self._changed:
            self.paused = True
            self.scheduler_paused = mode != "abort"
            if mode == "retract":
                self.waiting, self.running = self.waiting + self.running, 0
            self._changed.notify_all()
        if mode == "abort":
            self.abort_all()

    def resume(self) -> None:
        with self._changed:
            self.paused = self.scheduler_paused = False
            self.running, self.waiting = self.running + self.waiting, 0
            self._changed.notify_all()

    def abort_all(self) -> None:
        with self._changed:
            self._aborts += 1
            self.num_aborted += self.running + self.waiting
            self.running = self.waiting = 0
            self._changed.notify_all()

    def kill(self) -> None:
        """Wake every waiter with ``EngineDied``."""
        with self._changed:
            self._dead = True
            self._changed.notify_all()

    def is_idle(self, ignore_waiting: bool = False) -> bool:
        return self.running == 0 and (ignore_waiting or self.waiting == 0)

    def wait_until_idle(self, timeout_s: float | None) -> bool:
        """Whether nothing ran or waited before the time was up."""
        return self._wait_for(self.is_idle, timeout_s)

    def wait_for_writer_lock(self) -> None:
        """An unpaused engine touches weights only when no request is in flight; a paused one at once."""
        if not self.paused:
            self.wait_until_idle(None)

    def make_way(self, call: Call) -> None:
        """What SGLang aborts and waits for before the scheduler hears of a call."""
        if _aborts(call):
            self.abort_all()
        if call.path in _NEED_WRITER_LOCK:
            self.wait_for_writer_lock()
        if call.path == "/flush_cache" and (patience_s := float(call.query.get("timeout", 0))) > 0:
            self.wait_until_idle(patience_s)

    def decode(self, seconds: float) -> bool:
        """One client's request: waits out pauses, takes ``seconds`` of unpaused time. False if it was aborted."""
        self._admit()
        aborts, left = self._aborts, seconds
        while left > 0 and aborts == self._aborts:
            self._wait_for(lambda: not self.paused or aborts != self._aborts, None)
            started = time.monotonic()
            self._wait_for(lambda: self.paused or aborts != self._aborts, left)
            left -= time.monotonic() - started
        return self._leave(aborts)

    def _admit(self) -> None:
        with self._changed:
            self._wait_for(lambda: not self.paused, None)
            self.running += 1

    def _leave(self, aborts: int) -> bool:
        with self._changed:
            finished = aborts == self._aborts
            if finished and self.running:
                self.running -= 1
            elif finished:
                self.waiting -= 1
            self._changed.notify_all()
        return finished

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        with self._changed:
            held = self._changed.wait_for(lambda: self._dead or condition(), timeout_s)
            if self._dead:
                raise EngineDied
            return held


def _aborts(call: Call) -> bool:
    """/update_weight_version aborts every request unless told not to; the others do not unless told to."""
    if not call.path.startswith("/update_weight"):
        return False
    return bool((call.body or {}).get("abort_all_requests", call.path == "/update_weight_version"))
