"""The scripted engine's torch.distributed groups: it joins at once, and makes up what the trainer would broadcast.

As on a real server (0.5.15.post1 to 0.5.23): joining and leaving need no session and wait for no request; a bucket
that cannot be received is told apart by release, and so is whether its broadcast took place.
Invariant: no two broadcasts of one life bring the same content (``broadcast_digest``).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tests.fakes.calls import Call, Reply, outcome
from tests.fakes.dialects import EngineDialect
from tests.fakes.faults import EngineDied
from tests.fakes.unpickling import ITEM_SIZES

INIT, DESTROY = "/init_weights_update_group", "/destroy_weights_update_group"
RECEIVE = "/update_weights_from_distributed"
RECEIVED = "Succeeded to update parameter online."
_NAME_UNLESS_GIVEN = "weight_update_group"
_OF_THE_ENGINE = ("0",)
"""Torch numbers its groups, and a scheduler's first is that of all its ranks; further ones depend on its settings."""
_NAME_IN_USE = "The specified group name has already been created, please use a different group name"


class NotReceived(Exception):
    """A bucket that is not loaded, in SGLang's words."""


class Described(NamedTuple):
    """One tensor of a bucket, as a body describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.item_size


def broadcast_digest(group: str, number: int, name: str, dtype: str, shape: Sequence[int]) -> str:
    """Of a tensor that came with the group's ``number``-th broadcast of this life; the first is number 1."""
    return hashlib.sha256(repr((group, number, name, dtype, tuple(shape))).encode()).hexdigest()[:16]


class UpdateGroups:
    """Those of one engine life. What calls this needs the scheduler, so one call at a time."""

    def __init__(self, dialect: EngineDialect, device: str) -> None:
        self._dialect = dialect
        self._device = device
        self._num_broadcasts: Counter[str] = Counter()
        self.joined: list[str] = []

    def init(self, call: Call) -> Reply:
        """An empty name is an assertion, and what the scheduler raises ends the server."""
        name = _name(call.body)
        if not name:
            raise EngineDied("AssertionError: Group name cannot be empty")
        if problem := self._hindrance(name, call.body):
            return outcome(False, f"Failed to initialize custom process group: {problem}.")
        self.joined.append(name)
        return outcome(True, "Succeeded to initialize custom process group.")

    def destroy(self, call: Call) -> Reply:
        name = _name(call.body)
        if name not in self.joined:
            return outcome(False, "The group to be destroyed does not exist.")
        self.joined.remove(name)
        return outcome(True, "Succeeded to destroy custom process group.")

    def receive(self, body: Mapping[str, Any]) -> dict[str, str]:
        """One bucket: the digests of its tensors, by name. Raises ``NotReceived``."""
        group = _name(body)
        if group not in self.joined and self._dialect.unknown_group_is_fatal:
            raise EngineDied(f"AssertionError: {self._not_joined(group)}")
        try:
            tensors = self._broadcast(body, group)
        except ValueError as problem:
            raise NotReceived(self._dialect.not_received(str(problem))) from problem
        number = self._num_broadcasts[group]
        return {tensor.name: broadcast_digest(group, number, *tensor) for tensor in tensors}

    def _hindrance(self, name: str, body: Mapping[str, Any]) -> str:
        """Why torch would not make that group, as far as one member can tell."""
        backend, rank, world_size = body.get("backend", "nccl"), body["rank_offset"], body["world_size"]
        if name in (*_OF_THE_ENGINE, *self.joined):
            return _NAME_IN_USE
        if backend == "nccl" and self._device == "cpu":
            return "ProcessGroupNCCL is only supported with GPUs, no GPUs found!"
        if backend not in ("nccl", "gloo"):
            return f"Unknown backend type {backend}"
        return f"rank < size. {rank} vs {world_size}" if rank >= world_size else ""

    def _not_joined(self, group: str) -> str:
        return f"Group {group} not in {self.joined}. Please call `init_weights_update_group` first."

    def _broadcast(self, body: Mapping[str, Any], group: str) -> list[Described]:
        """What came of it; counts it if it took place. Raises ``ValueError`` in SGLang's or torch's words."""
        if group not in self.joined:
            raise ValueError(self._not_joined(group))
        bucketed = body.get("load_format") == "flattened_bucket"
        checks_first = bucketed and self._dialect.checks_buckets_first
        parts = zip(body["names"], body["dtypes"], body["shapes"], strict=checks_first)
        tensors = [_described(name, dtype, shape) for name, dtype, shape in parts]
        if bucketed and not tensors:
            raise ValueError("Cannot create empty tensor bucket")
        unaligned = _unaligned(tensors) if bucketed else None
        if checks_first and unaligned:
            tensor, offset = unaligned
            problem = f"Unaligned received tensor {tensor.name}: byte offset {offset}, dtype torch.{tensor.dtype}"
            raise ValueError(problem)
        self._num_broadcasts[group] += 1
        if unaligned:
            raise ValueError(f"self.storage_offset() must be divisible by {unaligned[0].item_size}")
        return tensors


def _name(body: Mapping[str, Any]) -> str:
    return str(body.get("group_name", _NAME_UNLESS_GIVEN))


def _described(name: str, dtype: str, shape: Sequence[int]) -> Described:
    """What torch.empty would make room for."""
    if dtype not in ITEM_SIZES:
        raise ValueError(f"module 'torch' has no attribute '{dtype}'")
    if any(extent < 0 for extent in shape):
        raise ValueError(f"Negative dimension in received tensor {name}: torch.Size({list(shape)})")
    return Described(name, dtype, tuple(shape))


def _unaligned(tensors: Iterable[Described]) -> tuple[Described, int] | None:
    """The first that does not begin at a multiple of its element's size, and where it begins: they lie densely."""
    offset = 0
    for tensor in tensors:
        if offset % tensor.item_size:
            return tensor, offset
        offset += tensor.size_bytes
    return None
