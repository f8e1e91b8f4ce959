"""The scripted engine's model: per TP rank, a digest for every tensor name.

Digests stand for content, so equal weights have equal checksums and give equal tokens.
"""

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tests.fakes import payloads
from tests.fakes.payloads import Entry
from tests.fakes.unpickling import unpickle

VOCABULARY = 512


class Weights:
    """What one engine life has loaded."""

    def __init__(self, tp_size: int, checkpoint: Mapping[str, str], known_names: Collection[str] | None) -> None:
        self.ranks: list[dict[str, str]] = [dict(checkpoint) for _ in range(tp_size)]
        self._known_names = known_names

    def load(self, entries: Sequence[Entry], every: int = 1) -> None:
        """Every ``every``-th tensor of every rank; a name that the model does not know is skipped in silence."""
        for rank, entry in zip(self.ranks, entries, strict=True):
            rank.update({tensor.name: tensor.digest() for tensor in entry.tensors[::every] if self._knows(tensor.name)})

    def receive(self, digests: Mapping[str, str], every: int = 1) -> None:
        """The same for what was broadcast, by name: every rank gets it whole."""
        arrived = {name: digests[name] for name in list(digests)[::every] if self._knows(name)}
        for rank in self.ranks:
            rank.update(arrived)

    def load_from_disk(self, folder: str) -> None:
        """Every tensor that the model has, from a checkpoint."""
        for rank in self.ranks:
            rank.update({name: _sha256(f"{folder} {name}")[:16] for name in rank})

    def tokens(self, prompt: Sequence[int], number: int, adapted: str = "") -> list[int]:
        """What this model answers greedily: a function of all weights, an adapter's too, and the prompt."""
        seed = f"{self.checksum()}{adapted} {list(prompt)}"
        return [int(_sha256(f"{seed} {position}")[:8], 16) % VOCABULARY for position in range(number)]

    def checksum(self) -> str:
        """Of all ranks."""
        return _sha256("".join(map(self.rank_checksum, range(len(self.ranks)))))

    def rank_checksum(self, rank: int) -> str:
        return _sha256("".join(name + digest for name, digest in sorted(self.ranks[rank].items())))

    def _knows(self, name: str) -> bool:
        return self._known_names is None or name in self._known_names


def decode_all(
    encoded: Sequence[str], tp_size: int, load_format: str | None, custom_loaders: Collection[str]
) -> tuple[Entry, ...]:
    """Entry i for TP rank i; a list that is too short is an IndexError, one that is too long is not looked at."""
    return tuple(
        payloads.decode(base64.b64decode(encoded[rank]), load_format, custom_loaders) for rank in range(tp_size)
    )


def unpickle_all(encoded: Sequence[str], tp_size: int) -> list[Any]:
    """The same, without a look at what is in them."""
    return [unpickle(base64.b64decode(encoded[rank])) for rank in range(tp_size)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
