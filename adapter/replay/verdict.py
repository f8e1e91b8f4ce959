"""How a load went, for the sidecar: SGLang drops what a loader returns and dies of what it raises.

Written into a file in /dev/shm that the sidecar has made and named in the header: one slot of ``SLOT_BYTES`` per TP
rank, JSON padded with zero bytes. The sidecar reads it once SGLang has answered (``sidecar/replay.py``).
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
NAME = re.compile("sglang-weight-sync-verdict-[0-9a-f]{32}")
SLOT_BYTES = 1024
MAX_WHY = 500


class Outcome(StrEnum):
    """What became of the bucket. All but the last two: the model has loaded it."""

    REPLAYED = "replayed"
    PROVEN = "proven"
    """Replayed and loaded by the model itself, with the same bytes as the result: from now on it is replayed."""
    RECORDED = "recorded"
    """Loaded by the model itself, under observation."""
    FELL_BACK = "fell_back"
    """Loaded by the model itself, since it cannot be replayed."""
    READY = "ready"
    """Nothing was to be loaded."""
    UNKNOWN = "unknown"
    """Nothing was loaded: the manifest is not known here. The bucket is held for the next call."""
    FAILED = "failed"
    """The model's own load raised: its weights may be mixed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rank's answer to one call."""

    nonce: str
    outcome: Outcome
    life: str
    """Which loader: another word after every start of the engine."""
    why: str = ""
    """Why it is not a replay, in a sentence."""


def write(name: str, rank: int, verdict: Verdict) -> None:
    """Into this rank's slot. Raises ``OSError`` or ``ValueError`` if that is not possible."""
    if not NAME.fullmatch(name) or rank < 0:
        raise ValueError(f"{name[:80]!r} is not the name of a verdict file")
    said = asdict(verdict) | {"why": verdict.why[:MAX_WHY]}
    text = json.dumps(said).encode()
    while len(text) > SLOT_BYTES:  # characters that take many bytes
        said["why"] = said["why"][: len(said["why"]) // 2]
        text = json.dumps(said).encode()
    file = os.open(SHM / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size < (rank + 1) * SLOT_BYTES:
            raise ValueError(f"{name} has no slot for rank {rank}")
        os.pwrite(file, text.ljust(SLOT_BYTES, b"\0"), rank * SLOT_BYTES)
    finally:
        os.close(file)
