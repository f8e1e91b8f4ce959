"""One line on a terminal for an update that goes bucket by bucket: how far it is, how fast, what it waits for.

Invariant: it takes no part in the update, so nothing that it meets (a closed stream, a narrow terminal) gets out of
here; where standard error is no terminal, or ``WEIGHT_SYNC_PROGRESS=0``, nothing is written at all.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

SWITCH = "WEIGHT_SYNC_PROGRESS"
EVERY_S = 0.1
"""No terminal is written to more often."""
GIB = 2**30
CLEAR_LINE = "\x1b[K"


class Progress:
    """One rank's line for one update; rank 0's alone is shown, since ranks share a terminal."""

    def __init__(
        self,
        title: str,
        rank: int,
        sizes: Sequence[int],
        out: TextIO | None = None,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] = lambda: shutil.get_terminal_size().columns,
    ) -> None:
        self._out = sys.stderr if out is None else out
        self._shown = rank == 0 and environ.get(SWITCH) != "0" and _is_terminal(self._out)
        self._title, self._sizes, self._clock, self._columns = title, sizes, clock, columns
        self._began = self._since = clock()
        self._drawn = -EVERY_S
        self._loaded = 0
        self._phase = ""
        self._spent: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """What happens from now on."""
        now = self._clock()
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now
        self._draw(now)

    def loaded(self) -> None:
        """The engine has loaded one more bucket."""
        self._loaded += 1
        self._draw(self._clock())

    def __enter__(self) -> None:
        """The update goes on for as long as the block does."""

    def __exit__(self, *raised: object) -> None:
        """Leave the last state on a line of its own."""
        if self._shown and self._drawn >= 0:
            self.phase("ended")
            self._write(f"\r{self._line(self._clock())}{CLEAR_LINE}\n")

    def _draw(self, now: float) -> None:
        if self._shown and now - self._drawn >= EVERY_S:
            self._drawn = now
            self._write(f"\r{self._line(now)}{CLEAR_LINE}")

    def _line(self, now: float) -> str:
        done, whole = sum(self._sizes[: self._loaded]), sum(self._sizes)
        rate = done / max(1e-9, now - self._began)
        text = f"{self._title}: bucket {self._loaded}/{len(self._sizes)}, {done / GIB:.2f} of {whole / GIB:.2f} GiB, "
        text += f"{rate / GIB:.2f} GiB/s, {self._phase}"
        waits = ", ".join(f"{name} {spent:.1f} s" for name, spent in self._spent.items() if spent >= EVERY_S and name)
        return (text + (f" ({waits})" if waits else ""))[: self._columns() - 1]

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):  # closed, or gone with its terminal
            self._shown = False


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (ValueError, AttributeError):  # closed; None, in a process without one
        return False
