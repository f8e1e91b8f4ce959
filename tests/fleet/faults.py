"""What happens to one host in the middle of a fleet's update, and how it is undone afterwards."""

import contextlib
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from os import kill
from typing import ClassVar

import torch

from adapter.process_group import BroadcastGroup, Sent
from tests.fleet.world import START_S, Site, wait_until


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind."""

    name: str
    strike: Callable[[Site], None]
    undo: Callable[[Site], None]

    def __str__(self) -> str:
        return self.name


class StruckGroup(BroadcastGroup):
    """At the second broadcast after ``arm``, the fault strikes first."""

    planned: ClassVar[list[Callable[[], None]]] = []
    _sent = 0

    @classmethod
    def arm(cls, strike: Callable[[], None]) -> None:
        """Plan it for the next update."""
        cls.planned.append(strike)

    def broadcast(self, flat: torch.Tensor) -> Sent:
        """Begin to send."""
        self._sent += 1
        if self.planned and self._sent % 2 == 0:
            self.planned.pop()()
        return super().broadcast(flat)


def _restart_engine(site: Site) -> None:
    site.restart_engine()
    wait_until(site.answers, START_S, "the engine")


def _restart_sidecar(site: Site) -> None:
    site.restart_sidecar()
    wait_until(site.answers, START_S, "the sidecar")


def _stop_for_a_while(site: Site) -> None:
    kill(site.sidecar.pid, signal.SIGSTOP)


def _go_on(site: Site) -> None:
    with contextlib.suppress(ProcessLookupError):
        kill(site.sidecar.pid, signal.SIGCONT)
    wait_until(site.answers, START_S, "the sidecar")


ENGINE_KILLED = Fault("engine killed", Site.kill_engine, _restart_engine)
SIDECAR_KILLED = Fault("sidecar killed", Site.kill_sidecar, _restart_sidecar)
SIDECAR_STOPPED = Fault("sidecar stopped", _stop_for_a_while, _go_on)
LINK_CUT = Fault("link cut", lambda site: site.host.cut(), lambda site: site.host.mend())
ALL = (ENGINE_KILLED, SIDECAR_KILLED, SIDECAR_STOPPED, LINK_CUT)


def in_a_moment(seconds: float, act: Callable[[], None]) -> threading.Timer:
    """From another thread."""
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer
