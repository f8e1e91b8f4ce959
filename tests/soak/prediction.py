"""What the engine holds at the end, told by the log alone.

Pure. Invariant: only a committed update changes what is served; one that failed half-way and a server that was started
again leave a content that nobody knows, which nothing but an update of every tensor ends.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.soak.log import read

READY, DIRTY, UNSYNCED = "READY", "DIRTY", "UNSYNCED"
COMMITTED, ABORTED, FAILED = "COMMITTED", "ABORTED", "FAILED"


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be found."""

    version: str
    """What the sidecar says is served; empty where that is no one version."""
    content: Mapping[str, int] | None
    """A seed for every tensor; None if the log cannot know."""
    state: str

    @property
    def digest(self) -> str:
        """Names the content."""
        return "" if self.content is None else content_digest(self.content)


AT_FIRST = Expected("default", None, READY)
"""A server that nobody has updated yet."""


def content_digest(content: Mapping[str, int]) -> str:
    """The same for the same seeds, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(content.items())).encode()).hexdigest()[:16]


def predict(lines: Iterable[str]) -> Expected:
    """What the log's last line leaves behind; raises ``ValueError`` for an update that cannot be meant so."""
    return functools.reduce(follow, lines, AT_FIRST)


def follow(before: Expected, line: str) -> Expected:
    """What one line makes of what was there."""
    if engine := read(line, "engine"):
        return Expected(engine["version"], None, UNSYNCED)
    update = read(line, "update")
    if update is None or update["outcome"] == ABORTED:
        return before
    if update["outcome"] == FAILED:
        return Expected("", None, DIRTY)
    return Expected(update["version"], _merged(before, update), READY)


def _merged(before: Expected, update: Mapping[str, Any]) -> Mapping[str, int]:
    carried = dict.fromkeys(update["names"], update["seed"])
    if before.content is None and not update["whole"]:
        raise ValueError(f"step {update['step']}: a part of the tensors says nothing about the rest")
    return carried if before.content is None else {**before.content, **carried}
