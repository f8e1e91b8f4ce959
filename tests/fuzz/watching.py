"""What must never show while requests are handled: tracebacks, defects, a loop that stands still, memory that grows."""

import asyncio
import ctypes
import gc
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

MAX_LAG_S = 5.0
"""How long the event loop may stand still, on a machine that is busy with other things too."""
LAG_LOOK_S = 0.02
WARM_UP = 0.3
"""Share of all samples that come before anything has to be level."""
GROWTH_MB = 24.0
GROWTH_OBJECTS = 0.10
MAX_LINE = 8192
OF_GRPC = ("ExecuteBatchError",)
"""An error whose caller had gone as it was sent."""
LOGGERS = ("sidecar", "grpc", "asyncio")


class LogWatch(logging.Handler):
    """Formats every record, and keeps what must not be logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.findings: list[str] = []
        self.by_grpc = 0
        """What gRPC logs of its own accord, see ``OF_GRPC``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Judge one record."""
        message = record.getMessage()
        if record.name.startswith("grpc") and any(word in message for word in OF_GRPC):
            self.by_grpc += 1
        elif record.exc_info and record.exc_info[0] is not asyncio.CancelledError:
            self._found(f"traceback: {message[:160]} {record.exc_info[1]!r:.200}")
        elif "a defect in the sidecar" in message:
            self._found(message[:200])
        elif len(message.splitlines()) > 1:
            self._found(f"more than one line: {message[:200]!r}")
        elif len(message) > MAX_LINE:
            self._found(f"a line of {len(message)} characters: {message[:200]!r}")

    def _found(self, what: str) -> None:
        if len(self.findings) < 1000:
            self.findings.append(f"log: {what}")

    def taken(self) -> list[str]:
        """What was found since the last time."""
        found, self.findings = self.findings, []
        return found

    def __enter__(self) -> "LogWatch":
        self._before = {name: logging.getLogger(name).level for name in LOGGERS}
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        for name, level in self._before.items():
            logger = logging.getLogger(name)
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = True


class LoopWatch:
    """Feels the pulse of the running loop; what no task awaits comes here too."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.longest_s = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "LoopWatch":
        asyncio.get_running_loop().set_exception_handler(self._unhandled)
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        asyncio.get_running_loop().set_exception_handler(None)

    def taken(self) -> list[str]:
        """What was found since the last time."""
        found, self.findings = self.findings, []
        return found

    def _unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.findings.append(f"unhandled: {context.get('message')} {context.get('exception')!r:.200}")

    async def _beat(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_LOOK_S)
            lag = time.monotonic() - before - LAG_LOOK_S
            self.longest_s = max(self.longest_s, lag)
            if lag > MAX_LAG_S:
                self.findings.append(f"the event loop stood still for {lag:.1f} s")


class MemoryWatch:
    """Samples of this process, taken once everything that can be freed is."""

    def __init__(self) -> None:
        self.rss_mb: list[float] = []
        self.objects: list[int] = []
        self._libc = ctypes.CDLL(None)

    def sample(self) -> None:
        """Take one."""
        gc.collect()
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rss_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.objects.append(len(gc.get_objects()))

    def findings(self) -> list[str]:
        """Whether the second half of the time after the warm-up has more than the first."""
        rss, objects = _halves(self.rss_mb), _halves([float(number) for number in self.objects])
        found = []
        if rss[1] - rss[0] > GROWTH_MB:
            found.append(f"memory grew from {rss[0]:.0f} to {rss[1]:.0f} MB")
        if objects[1] > objects[0] * (1 + GROWTH_OBJECTS) + 20_000:
            found.append(f"objects grew from {objects[0]:.0f} to {objects[1]:.0f}")
        return found


def _halves(samples: list[float]) -> tuple[float, float]:
    warm = samples[int(len(samples) * WARM_UP) :]
    if len(warm) < 4:
        return 0.0, 0.0
    half = len(warm) // 2
    return median(warm[:half]), median(warm[half:])
