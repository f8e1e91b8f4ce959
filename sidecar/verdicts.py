"""What the replay loader says of a bucket: a file in /dev/shm that this sidecar makes and the engine's ranks write.

SGLang drops what a loader returns, so this is its way of answering (``adapter.replay.verdict``): one slot per TP rank,
with JSON. Invariant: a verdict is of the very call that it is read for, as its nonce says; anything else is none.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sidecar.memory import SHM_DIRECTORY

SLOT_BYTES = 1024


class Outcome(StrEnum):
    """What became of one rank's bucket; all but the last three: its model has loaded it."""

    REPLAYED = "replayed"
    PROVEN = "proven"
    RECORDED = "recorded"
    FELL_BACK = "fell_back"
    READY = "ready"
    UNKNOWN = "unknown"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rank's answer."""

    outcome: Outcome
    life: str
    """Of the process that answered: another word after every start."""
    why: str


class VerdictFile:
    """The file, one per address that a sidecar listens at, so that a killed one's is found again."""

    def __init__(self, address: str) -> None:
        self.name = f"sglang-weight-sync-verdict-{hashlib.sha256(address.encode()).hexdigest()[:32]}"
        self._num_ranks = 0

    def clear(self, num_ranks: int) -> None:
        """Make room for as many answers, all empty. Raises ``OSError``."""
        if self._num_ranks < num_ranks:
            self._make()
            self._num_ranks = num_ranks
        elif not (SHM_DIRECTORY / self.name).exists():  # cleaned up by somebody
            self._make()
        with (SHM_DIRECTORY / self.name).open("r+b") as file:
            file.write(bytes(num_ranks * SLOT_BYTES))

    def read(self, num_ranks: int, nonce: str) -> list[Verdict | None]:
        """By rank: its answer to that call, or None."""
        try:
            said = (SHM_DIRECTORY / self.name).read_bytes()
        except OSError:
            return [None] * num_ranks
        return [_verdict(said[rank * SLOT_BYTES : (rank + 1) * SLOT_BYTES], nonce) for rank in range(num_ranks)]

    def remove(self) -> None:
        """It is not needed any more."""
        self._num_ranks = 0
        with suppress(OSError):
            (SHM_DIRECTORY / self.name).unlink()

    def _make(self) -> None:
        """A new file of this user's; one that was there is a predecessor's."""
        with suppress(FileNotFoundError):
            (SHM_DIRECTORY / self.name).unlink()
        os.close(os.open(SHM_DIRECTORY / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _verdict(slot: bytes, nonce: str) -> Verdict | None:
    try:
        said: dict[str, Any] = json.loads(slot.rstrip(b"\0"))
        if said["nonce"] != nonce:
            return None
        return Verdict(Outcome(said["outcome"]), str(said["life"]), str(said["why"]))
    except (KeyError, TypeError, ValueError):
        return None
