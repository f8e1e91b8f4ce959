"""What was recorded of one manifest -> copies that can be made again, from other bytes.

    unproven --- replayed and loaded by the model itself, with the same result, of other bytes than before ---> proven
       |                                                                                                          |
       +--- another result, or the recording was refused ---> refused (the model loads it itself) <---------------+
                                                              (never back)           its tensors moved: recorded anew

Invariant: a plan writes what the recorded load wrote, no more, in an order that gives the same result; and it is
replayed only onto the very memory that it was recorded for.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from adapter.replay.header import Header
from adapter.replay.reachable import ModelTensors
from adapter.replay.recorder import Copy, Fill, Recording, Write

# What is not stored as itself: SGLang packs, scales or transposes such weights after loading.
_QUANTISED = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2}
_POISON = 1


class Trust(Enum):
    """What may be done with a plan."""

    UNPROVEN = "unproven"
    PROVEN = "proven"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One recorded copy; where in the bucket it reads."""

    target: torch.Tensor
    offset: int
    """Bytes from the start of the bucket."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def source_in(self, flat: torch.Tensor) -> torch.Tensor:
        """What it reads, of another bucket of the same manifest."""
        typed = torch.empty(0, dtype=self.dtype, device=flat.device)
        start = flat.storage_offset() + self.offset
        return typed.set_(flat.untyped_storage(), start // self.dtype.itemsize, self.shape, self.stride)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Plan:
    """One manifest's copies for one model."""

    header: Header
    """With its manifest."""
    trust: Trust
    why: str = ""
    """Of a refusal."""
    pieces: tuple[Piece, ...] = ()
    """Copies into places that nothing else writes: in any order."""
    in_order: tuple[Piece | Fill, ...] = ()
    """Constants, and what overlaps something: in the order of the recording, after the others."""
    tensors: ModelTensors | None = field(default=None, repr=False)
    """Where the model's tensors were."""

    @property
    def digest(self) -> str:
        """Of its manifest."""
        return self.header.digest

    def refuse(self, why: str) -> None:
        """It is not replayed any more; the reason stays."""
        self.trust, self.why = Trust.REFUSED, why
        self.pieces = self.in_order = ()
        self.tensors = None

    def storages(self) -> set[int]:
        """Addresses of the storages that a replay writes into."""
        return {write.target.untyped_storage().data_ptr() for write in (*self.pieces, *self.in_order)}

    def poison(self) -> None:
        """Overwrite what a replay writes, so that what it leaves out shows."""
        for piece in (*self.pieces, *self.in_order):
            piece.target.fill_(_POISON)


def plan_of(
    model: torch.nn.Module,
    header: Header,
    flat: torch.Tensor,
    recording: Recording,
    before: ModelTensors,
    after: ModelTensors,
) -> Plan:
    """Judge a recording. ``before``, ``after``: the model's tensors around it."""
    skippable = header.skippable | _tied(model)
    why = recording.refusal or _changed(flat, before, after) or _unread(header, flat, recording.writes, skippable)
    plan = Plan(header, Trust.REFUSED if why else Trust.UNPROVEN, why)
    if not why:
        alone, together = _apart(recording.writes)
        plan.pieces = tuple(_piece(write, flat) for write in alone if isinstance(write, Copy))
        plan.in_order = tuple(_piece(w, flat) if isinstance(w, Copy) else w for w in together)
        plan.tensors = after
    return plan


def _changed(flat: torch.Tensor, before: ModelTensors, after: ModelTensors) -> str:
    if after.has(flat):
        return "the model keeps a tensor of the bucket instead of copying it"
    if not before.same_as(after):
        return "loading makes new tensors in the model"
    quantised = after.dtypes() & _QUANTISED
    if quantised:
        return f"the model holds {', '.join(sorted(map(str, quantised)))}, which SGLang processes after loading"
    return ""


def _tied(model: torch.nn.Module) -> frozenset[str]:
    """An output head that is the embeddings again is not read."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return frozenset({"lm_head.weight"} if tied else ())


def _unread(header: Header, flat: torch.Tensor, writes: Iterable[Write], skippable: frozenset[str]) -> str:
    """What the model has left out of the bucket, unless it may, or parallelism explains it; empty if nothing."""
    read = _bytes_read(header, flat, writes)
    tp_size, ep_size = header.ranks
    for part in header.parts:
        shard = tp_size > 1 and read[part.name] > 0
        expert_elsewhere = ep_size > 1 and ".experts." in part.name
        if read[part.name] < part.num_bytes and not (part.name in skippable or shard or expert_elsewhere):
            return f"the model has read {read[part.name]} of the {part.num_bytes} bytes of {part.name}"
    return ""


def _bytes_read(header: Header, flat: torch.Tensor, writes: Iterable[Write]) -> dict[str, int]:
    """By tensor; what is read twice counts once."""
    read = dict.fromkeys((part.name for part in header.parts), 0)
    places = sorted((part.offset, part.name) for part in header.parts if part.num_bytes)
    sources = [write.source for write in writes if isinstance(write, Copy) and write.source.numel()]
    reached: dict[str, int] = {}
    """How far each tensor has been read in one piece; what has gaps counts by its elements."""
    spans = {(_offset(source, flat), source.nbytes, source.is_contiguous(), source.stride()) for source in sources}
    for start, length, dense, _ in sorted(spans):
        _, name = places[bisect_right(places, start, key=lambda place: place[0]) - 1]
        begins = max(start, reached.get(name, start)) if dense else start
        read[name] += max(0, start + length - begins)
        if dense:
            reached[name] = max(reached.get(name, 0), start + length)
    return read


def _offset(source: torch.Tensor, flat: torch.Tensor) -> int:
    return source.data_ptr() - flat.data_ptr()


def _piece(copy: Copy, flat: torch.Tensor) -> Piece:
    source = copy.source
    return Piece(copy.target, _offset(source, flat), source.dtype, source.shape, source.stride())


def _apart(writes: Sequence[Write]) -> tuple[list[Write], list[Write]]:
    """Copies whose places nothing else writes, and all others, each in order."""
    overlapping = _overlapping([write.target for write in writes])
    alone: list[Write] = []
    together: list[Write] = []
    for number, write in enumerate(writes):
        plain = isinstance(write, Copy) and write.target.shape == write.source.shape
        (alone if plain and number not in overlapping else together).append(write)
    return alone, together


def _overlapping(targets: Sequence[torch.Tensor]) -> set[int]:
    """The numbers of those that may share a byte with another, judged by first and last byte."""
    spans = sorted((target.data_ptr(), _end(target), number) for number, target in enumerate(targets) if target.numel())
    found: set[int] = set()
    reach, farthest = 0, -1
    for start, end, number in spans:
        if start < reach:
            found |= {number, farthest}
        if end > reach:
            reach, farthest = end, number
    return found


def _end(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
