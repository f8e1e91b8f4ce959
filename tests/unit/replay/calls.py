"""Calls of the loader as SGLang makes them, with the sidecar's own headers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter.replay import header as headers
from adapter.replay.replayer import Answer, Replayer
from tests.unit.replay.models import COLUMNS, ROWS, Weights

SIZE = 256
TENSORS: list[list[Any]] = [["q", "float32", [ROWS, COLUMNS], 0], ["k", "float32", [ROWS, COLUMNS], 96]]
TENSORS += [["norm", "float32", [COLUMNS], 192]]
VERDICT = "sglang-weight-sync-verdict-" + "0" * 32


def bucket(seed: int) -> torch.Tensor:
    """Other bytes for every seed."""
    numbers = torch.randn(SIZE // 4, generator=torch.Generator().manual_seed(seed))
    return numbers.view(torch.uint8).clone()


def words(ask: str = "load", *, in_full: bool = True, **more: object) -> dict[str, Any]:
    """What the sidecar says, before it is written down."""
    said: dict[str, Any] = {"ask": ask, "nonce": "n", "verdict": VERDICT, "rank": 0, "size": SIZE, "ranks": [1, 1]}
    said["digest"] = digest()
    if in_full:
        said["tensors"] = TENSORS
    return said | more


def text(ask: str = "load", *, in_full: bool = True, **more: object) -> str:
    """A header as it travels."""
    return headers.MAGIC + json.dumps(words(ask, in_full=in_full, **more))


def digest(size: int = SIZE) -> str:
    """As the sidecar computes it."""
    lines = "".join(f"{n}\t{dtype}\t{','.join(map(str, shape))}\t{at}\n" for n, dtype, shape, at in TENSORS)
    return hashlib.sha256(f"bucket {size}\n{lines}".encode()).hexdigest()


def serve(replayer: Replayer, model: nn.Module, flat: torch.Tensor, ask: str = "load", **more: Any) -> Answer:
    """One call."""
    return replayer.serve(model, headers.parse(text(ask, **more)), flat)


def weights(flat: torch.Tensor) -> Weights:
    """What the model's own load is given."""
    return [(part.name, part.view_in(flat)) for part in headers.parse(text()).parts]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that the model computes with."""
    derived = {name: value for name, value in vars(model).items() if isinstance(value, torch.Tensor)}
    return {**dict(model.state_dict()), **derived}


def assert_loaded(model: nn.Module, flat: torch.Tensor) -> None:
    """The model is what its own load makes of ``flat``."""
    own = type(model)()
    own.load_weights(weights(flat))  # type: ignore[operator]
    for name, tensor in state(own).items():
        assert torch.equal(state(model)[name], tensor), name


def verdict_file() -> Path:
    return Path("/dev/shm") / VERDICT
