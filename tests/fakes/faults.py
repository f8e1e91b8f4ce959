"""What the scripted engine can be told to do wrong, and when."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

ANY_PATH = "*"


class Fault(Enum):
    """One kind of misbehaviour, at one call."""

    DIE = auto()
    """The process is killed before it acts: connections are cut, the port is closed."""
    DIE_AFTER = auto()
    """It acts, then is killed before it answers."""
    HALF_LOAD = auto()
    """It loads every other tensor of every rank, then is killed. Only for loads from memory and from a group."""
    SKIP_HALF = auto()
    """It loads every other tensor and answers 200, as SGLang does for names that it does not know."""
    CUT = auto()
    """The connection is cut and nothing is done."""
    LOSE_REPLY = auto()
    """It acts, then cuts the connection."""
    HANG = auto()
    """It waits for ``ScriptedEngine.release`` before it acts; like a stopped scheduler, it holds up what needs it."""
    LATE = auto()
    """It acts at once and answers ``delay_s`` later."""
    REFUSE = auto()
    """It does nothing and answers ``status`` with ``message``."""


class EngineDied(Exception):
    """The engine's process is gone: cut every connection."""


class ConnectionCut(Exception):
    """Only this connection is gone."""


@dataclass(slots=True)
class PlannedFault:
    """A fault that waits for its call."""

    path: str
    fault: Fault
    skip: int
    """Matching calls that still pass unharmed."""
    times: int
    """Calls that are still to be hit."""
    delay_s: float
    status: int
    message: str

    def hits(self, path: str) -> bool:
        """Whether this call is one of those; counts it."""
        if self.times == 0 or self.path not in (path, ANY_PATH):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class FaultPlan:
    """All planned faults, and the calls that hang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[PlannedFault] = []
        self._hanging: list[threading.Event] = []

    def add(self, planned: PlannedFault) -> None:
        with self._lock:
            self._planned.append(planned)

    def take(self, path: str) -> PlannedFault | None:
        """The first fault that hits this call, if any."""
        with self._lock:
            return next((planned for planned in self._planned if planned.hits(path)), None)

    def hang(self, entered: Callable[[], None] = lambda: None) -> None:
        """Block the calling thread until ``release``."""
        gate = threading.Event()
        with self._lock:
            self._hanging.append(gate)
        entered()
        gate.wait()

    @property
    def num_hanging(self) -> int:
        with self._lock:
            return len(self._hanging)

    def release(self) -> None:
        """Let every call that hangs go on, and plan no more hangs."""
        with self._lock:
            self._planned = [planned for planned in self._planned if planned.fault is not Fault.HANG]
            for gate in self._hanging:
                gate.set()
            self._hanging.clear()

    def clear(self) -> None:
        """Forget everything planned; calls that hang go on."""
        self.release()
        with self._lock:
            self._planned.clear()
