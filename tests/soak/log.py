"""The soak's log: one JSON object a line, written as things happen.

Owns the file. Invariant: a line is on disk before the next thing is done, so that a soak that was cut short can be read
too; `prediction` reads nothing else.

    begin    seed and size of the soak
    update   one update: what it carried, what went wrong meanwhile, how it ended, the sidecar's state after it
    engine   a server was started in place of one that was killed, and the version that it calls itself
    sidecar  a sidecar was started in place of one that ended
    rank     a trainer rank was started in place of one that was killed
    sample   what every process held
"""

import json
import time
from pathlib import Path
from typing import Any


class SoakLog:
    """One file, added to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        self._started = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, event: str, **fields: Any) -> None:
        """One line."""
        line = json.dumps({"event": event, "at": round(time.monotonic() - self._started, 3), **fields})
        with self.path.open("a") as file:
            file.write(line + "\n")
        self.lines.append(line)


def read(line: str, *events: str) -> dict[str, Any] | None:
    """One line's fields, if it is one of these events."""
    fields: dict[str, Any] = json.loads(line)
    return fields if fields["event"] in events else None
