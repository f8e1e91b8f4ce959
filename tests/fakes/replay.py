"""The replay loader inside a scripted engine: it answers as ``adapter.loader`` does, and as no good one would.

It has no model: what it "loads" are the tensors that the manifest names. Held to the real one by
``tests/integration/test_replay.py`` and ``tests/e2e/test_replay.py``, which share what is asked of both.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.payloads import Entry, LoadedTensor
from tests.fakes.unpickling import ITEM_SIZES, NoTensor, TensorView

LOADER = "adapter.loader.load"
MAGIC = "sglang-weight-sync replay 1\n"
SLOT_BYTES = 1024
EMPTY = Entry(())
_lives = itertools.count()


@dataclass
class ReplayScript:
    """How the loaders of all ranks behave; a test may change it at any time."""

    outcomes: list[str] = field(default_factory=list)
    """Of the next loads, one after the other; afterwards "replayed". "silent": no answer; "failed": as it says."""
    silent_ranks: set[int] = field(default_factory=set)
    """They load, and answer nothing."""
    headers: list[dict[str, Any]] = field(default_factory=list)
    """Everything that was asked, of every rank."""


class FakeLoaders:
    """Of one engine's life: a loader per TP rank."""

    def __init__(self, script: ReplayScript) -> None:
        self._script = script
        self._life = f"life {next(_lives)}"
        self._known: dict[tuple[int, str], list[Any]] = {}
        self._held: dict[int, TensorView] = {}

    def load(self, payloads: Sequence[Any]) -> tuple[Entry, ...]:
        """What each rank loads of its payload, ``[(header, tensor)]``."""
        outcome = self._script.outcomes[0] if self._script.outcomes else "replayed"
        asks = [self._read(payload) for payload in payloads]
        if any(ask["ask"].startswith("load") for ask, _ in asks) and self._script.outcomes:
            self._script.outcomes.pop(0)
        return tuple(self._serve(rank, ask, view, outcome) for rank, (ask, view) in enumerate(asks))

    def forget(self) -> None:
        """Every manifest."""
        self._known.clear()

    def _read(self, payload: Any) -> tuple[dict[str, Any], Any]:
        ((text, view),) = payload
        assert text.startswith(MAGIC)
        ask: dict[str, Any] = json.loads(text.removeprefix(MAGIC))
        self._script.headers.append(ask)
        return ask, view

    def _serve(self, rank: int, ask: dict[str, Any], view: Any, outcome: str) -> Entry:
        assert ask["rank"] == rank
        if ask["ask"] in ("hello", "nothing"):
            self._answer(ask, "ready")
            return EMPTY
        flat = self._held.pop(rank) if ask["ask"] == "load_held" else view
        if "tensors" in ask:
            self._known[rank, ask["digest"]] = ask["tensors"]
        tensors = self._known.get((rank, ask["digest"]))
        if tensors is None:
            self._held[rank] = flat
            self._answer(ask, "unknown")
            return EMPTY
        self._answer(ask, outcome)
        return EMPTY if isinstance(flat, NoTensor) else Entry(tuple(_loaded(flat, *tensor) for tensor in tensors), flat)

    def _answer(self, ask: dict[str, Any], outcome: str) -> None:
        if outcome == "silent" or ask["rank"] in self._script.silent_ranks:
            return
        said = {"nonce": ask["nonce"], "outcome": outcome, "life": self._life, "why": f"it was to be {outcome}"}
        with (Path("/dev/shm") / ask["verdict"]).open("r+b") as file:
            file.seek(ask["rank"] * SLOT_BYTES)
            file.write(json.dumps(said).encode().ljust(SLOT_BYTES, b"\0"))


def _loaded(flat: TensorView, name: str, dtype: str, shape: list[int], offset: int) -> LoadedTensor:
    start = flat.start_byte + offset
    return LoadedTensor(name, dtype, tuple(shape), flat.storage, start, start + math.prod(shape) * ITEM_SIZES[dtype])
