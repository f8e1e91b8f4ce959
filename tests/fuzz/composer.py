"""Random manifests and handles through the payload composer: what comes out loads in SGLang, and is what went in.

Names, texts and bytes are as hostile as protobuf can carry them: nothing here has passed the sidecar's checks, but that
a bucket fits its memory, so the composer alone is on trial.
"""

import json
import random
from dataclasses import dataclass
from math import prod
from typing import Any

from sidecar.manifest import ITEM_SIZES, BucketSpec, TensorSpec
from sidecar.memory import CudaIpcMemory, Memory, SharedMemory
from sidecar.payload import BucketPayload, replay_entry
from tests.fakes.unpickling import NoTensor
from tests.fuzz import safe_unpickler
from tests.fuzz.payload_check import ALLOWED_GLOBALS, REPLAY_MAGIC, globals_of, memory_of
from tests.fuzz.values import Values

MANY, SOME = 10_000, 300
HUGE_NAME = 64 << 10
HUGE_SHAPES = ((2**62, 0), (2**31, 2**20), (1,) * 64, (0, 2**62, 7), (2**40,))


@dataclass(frozen=True, slots=True)
class Drawn:
    """One payload's plain fields."""

    bucket: BucketSpec
    memory: Memory


class ComposerFuzz:
    """Draws from one generator of random numbers."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._values = Values(rng)

    def check_one(self) -> int:
        """Compose a bucket's and a replay loader's payload, and read both; how many payloads that were."""
        drawn = self._draw()
        _check_bucket(drawn)
        _check_replay(drawn, self._values.text(), with_memory=self._rng.random() < 0.7)
        return 2

    def _draw(self) -> Drawn:
        chance = self._rng.random()
        number = MANY if chance < 0.0005 else SOME if chance < 0.01 else self._rng.randint(1, 8)
        tensors = tuple(self._tensor() for _ in range(number))
        size = self._values.unsigned(63)
        return Drawn(BucketSpec(size, tensors), self._memory(size))

    def _tensor(self) -> TensorSpec:
        rng, dtype = self._rng, self._rng.choice(list(ITEM_SIZES))
        shape = rng.choice(HUGE_SHAPES) if rng.random() < 0.1 else tuple(rng.choices((0, 1, 2, 7, 255, 2**31), k=3))
        shape = () if rng.random() < 0.1 else shape
        return TensorSpec(self._name(), dtype, shape, self._values.unsigned(63), prod(shape) * ITEM_SIZES[dtype])

    def _name(self) -> str:
        if self._rng.random() < 0.002:
            return self._rng.choice(("x", "漢", "\n", "'")) * HUGE_NAME
        return self._values.text()

    def _memory(self, at_least: int) -> Memory:
        values = self._values
        size = max(at_least, values.unsigned(64))
        if self._rng.random() < 0.5:
            return SharedMemory(values.text(), values.text(), size)
        return CudaIpcMemory(
            device_uuid=values.text(),
            memory_handle=values.blob(),
            size_bytes=size,
            storage_offset_bytes=values.unsigned(64),
            ref_counter_handle=values.text(),
            ref_counter_offset=values.unsigned(64),
            event_handle=values.blob(),
            event_sync_required=self._rng.random() < 0.5,
        )


def _check_bucket(drawn: Drawn) -> None:
    data = BucketPayload(drawn.bucket).entry(drawn.memory)
    loaded = _loaded(data)
    assert list(loaded) == ["flattened_tensor", "metadata"]
    _check_flat(loaded["flattened_tensor"], drawn)
    found = tuple(
        TensorSpec(one.name, one.dtype.name, one.shape, one.start_idx, one.numel) for one in loaded["metadata"]
    )
    assert found == drawn.bucket.tensors
    assert all(one.end_idx == one.start_idx + one.numel for one in loaded["metadata"])


def _check_replay(drawn: Drawn, text: str, *, with_memory: bool) -> None:
    """What the sidecar writes there is JSON; here it is any text inside JSON."""
    header = REPLAY_MAGIC + json.dumps({"ask": "load", "digest": text}, separators=(",", ":"))
    data = replay_entry(header, drawn.memory if with_memory else None, drawn.bucket.size_bytes)
    ((said, flat),) = _loaded(data)
    assert said == header
    if with_memory:
        _check_flat(flat, drawn)
    else:
        assert isinstance(flat, NoTensor)


def _check_flat(flat: Any, drawn: Drawn) -> None:
    assert memory_of(flat) == drawn.memory
    assert flat.shape == (drawn.bucket.size_bytes,)


def _loaded(data: bytes) -> Any:
    foreign = globals_of(data) - ALLOWED_GLOBALS
    assert not foreign, f"it names {sorted(foreign)}"
    return safe_unpickler.load_in_all(data)
