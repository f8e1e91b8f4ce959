"""Requests that once found a defect, kept byte by byte in ``seeds.txt``: a change of the generators changes none.

One a line: the kind of world, the RPC, the request's bytes (zlib, base64), and after # what it did.
"""

import base64
import zlib
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.scenarios import Request

SEEDS = Path(__file__).with_name("seeds.txt")


@dataclass(frozen=True, slots=True)
class Kept:
    """One line."""

    kind: str
    request: Request
    what: str


def read(path: Path = SEEDS) -> list[Kept]:
    """All of them."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [_parsed(line) for line in lines]


def written(kind: str, request: Request, what: str) -> str:
    """A line for ``seeds.txt``."""
    packed = base64.b64encode(zlib.compress(request.wire, 9)).decode()
    return f"{kind} {request.method} {packed} # {what}"


def _parsed(line: str) -> Kept:
    said, _, what = line.partition(" # ")
    kind, method, packed = said.split(" ")
    return Kept(kind, Request(method, zlib.decompress(base64.b64decode(packed))), what)
