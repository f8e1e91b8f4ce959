"""What the sidecar says with a bucket: which manifest, which rank, where the verdict goes. Parsed, never trusted.

The sidecar writes it (``sidecar/replay.py``) as the name of the one tensor of a payload: ``MAGIC``, then JSON. A name
that does not begin so, or has other fields, is not from there, and is refused.
"""

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

import torch

MAGIC = "sglang-weight-sync replay 1\n"
KEYS = {"ask", "digest", "event", "lease", "nonce", "rank", "ranks", "size", "skippable", "tensors", "verdict"}


class Ask(StrEnum):
    """What is wanted."""

    HELLO = "hello"
    """An answer: whether verdicts arrive, and of which loader."""
    LOAD = "load"
    """The bucket that comes with it."""
    LOAD_HELD = "load_held"
    """The bucket that came with the call before, whose manifest was not known."""
    NOTHING = "nothing"
    """Another rank is meant."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor inside the bucket."""

    name: str
    """Hugging Face name."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the bucket."""

    @property
    def num_bytes(self) -> int:
        """Its length, without gaps."""
        return prod(self.shape) * self.dtype.itemsize

    def view_in(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor itself. ``flat``: the bucket, uint8 of one dimension."""
        return flat[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """One call, for one rank."""

    ask: Ask
    nonce: str
    """Names this call in the verdict."""
    verdict: str
    """Name of the file in /dev/shm where the verdict goes."""
    rank: int
    """TP rank that it is for."""
    digest: str = ""
    """Of the bucket's manifest."""
    size: int = 0
    """Bytes of the bucket."""
    lease: str = ""
    """As long as this lease (``adapter.lease``) is wanted, the bucket's memory may stay mapped; empty: not at all."""
    event: bytes = b""
    """What to wait for before the bucket is read, as CUDA exports it; empty: nothing."""
    ranks: tuple[int, int] = (1, 1)
    """The engine's tensor-parallel and expert-parallel sizes."""
    parts: tuple[Part, ...] = ()
    """The manifest, or nothing: then ``digest`` must be known here."""
    skippable: frozenset[str] = frozenset()
    """Names that the model may leave out."""


def parse(text: object) -> Header:
    """Raises ``ValueError`` for whatever the sidecar does not write."""
    if not isinstance(text, str) or not text.startswith(MAGIC):
        raise ValueError(f"the tensor is called {str(text)[:60]!r}: this is no payload of the sidecar's")
    try:
        said: dict[str, Any] = json.loads(text[len(MAGIC) :])
        if set(said) - KEYS:
            raise ValueError(f"it has the unknown fields {sorted(set(said) - KEYS)}")
        header = _header(said)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"the sidecar's header cannot be read ({type(error).__name__}: {error})") from error
    if header.parts and digest_of(header) != header.digest:
        raise ValueError("the manifest in the header is not the one that its digest names")
    return header


def digest_of(header: Header) -> str:
    """SHA-256 of the manifest, as the sidecar computes it for one bucket."""
    lines = hashlib.sha256(f"bucket {header.size}\n".encode())
    for part in header.parts:
        dtype, shape = str(part.dtype).removeprefix("torch."), ",".join(map(str, part.shape))
        lines.update(f"{part.name}\t{dtype}\t{shape}\t{part.offset}\n".encode())
    return lines.hexdigest()


def _header(said: dict[str, Any]) -> Header:
    size = int(said.get("size", 0))
    parts = tuple(_part(entry, size) for entry in said.get("tensors", ()))
    tp_size, ep_size = said.get("ranks", (1, 1))
    return Header(
        Ask(said["ask"]),
        nonce=str(said["nonce"]),
        verdict=str(said["verdict"]),
        rank=int(said["rank"]),
        digest=str(said.get("digest", "")),
        size=size,
        lease=str(said.get("lease", "")),
        event=bytes.fromhex(said.get("event", "")),
        ranks=(int(tp_size), int(ep_size)),
        parts=parts,
        skippable=frozenset(map(str, said.get("skippable", ()))),
    )


def _part(entry: list[Any], size: int) -> Part:
    name, dtype, shape, offset = entry
    element = getattr(torch, dtype)
    if not isinstance(element, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype")
    part = Part(name, element, tuple(map(int, shape)), int(offset))
    if part.offset < 0 or min(part.shape, default=0) < 0 or part.offset + part.num_bytes > size:
        raise ValueError(f"{name} lies outside of the bucket's {size} bytes")
    return part
