"""The last few things that were made of something, found again by that.

Invariant: no more than ``kept`` are held, those that were used last.
"""

from itertools import chain
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

KEPT = 8


class Recent(Generic[Key, Value]):
    """By keys that are compared, not hashed: the same object at once, others as long as they are equal."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._entries: list[tuple[Key, Value]] = []
        """The one used last is the last."""

    def find(self, key: Key) -> Value | None:
        """What was put under this key."""
        at = self._index(key)
        if at is None:
            return None
        _, value = self._entries.pop(at)
        self._entries.append((key, value))  # under the newer of two equal keys, which is known at once from now on
        return value

    def put(self, key: Key, value: Value) -> None:
        """Hold ``value``, in place of what this key had; the one that was not used for longest goes."""
        at = self._index(key)
        if at is not None:
            del self._entries[at]
        self._entries.append((key, value))
        del self._entries[: -self._kept]

    def clear(self) -> None:
        """Hold nothing."""
        self._entries.clear()

    def _index(self, key: Key) -> int | None:
        same = (at for at, (known, _) in enumerate(self._entries) if known is key)
        equal = (at for at, (known, _) in enumerate(self._entries) if known == key)
        return next(chain(same, equal), None)
