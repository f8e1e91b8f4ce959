"""Changes to messages that keep them messages, through the descriptor, and to bytes that may not."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.fuzz.values import Values

MAX_WIRE = 4 << 20
"""A request of more is cut: gRPC refuses what is larger than the sidecar's limit before anything of ours sees it."""

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: 32,
    FieldDescriptor.CPPTYPE_UINT32: 32,
    FieldDescriptor.CPPTYPE_INT64: 64,
    FieldDescriptor.CPPTYPE_UINT64: 64,
}
_SIGNED = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)


class Mutator:
    """Draws its changes from one generator of random numbers."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._values = Values(rng)
        self._wire_changes: tuple[Callable[[bytes], bytes], ...] = (
            self._truncated,
            self._flipped,
            self._with_unknown_field,
            self._spliced,
            self._twice,
        )

    def change(self, message: Message) -> None:
        """One to four fields, anywhere in the message."""
        for _ in range(self._rng.choice((1, 1, 1, 2, 4))):
            self._change_field(self._rng.choice(list(_messages(message))))

    def wire(self, sent: bytes) -> bytes:
        """The bytes of a message, damaged or added to."""
        return self._rng.choice(self._wire_changes)(sent)[:MAX_WIRE]

    def garbage(self) -> bytes:
        """Bytes of no message."""
        return self._rng.randbytes(self._rng.choice((0, 1, 2, 5, 20, 200, 2000)))

    # Fields.

    def _change_field(self, message: Message) -> None:
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        if not fields:
            return
        field = self._rng.choice(fields)
        if field.is_repeated:
            self._change_repeated(message, field)
        elif self._rng.random() < 0.15:
            message.ClearField(field.name)
        elif field.message_type is not None:
            self._change_child(getattr(message, field.name))
        else:
            setattr(message, field.name, self._scalar(field))

    def _change_child(self, child: Message) -> None:
        child.SetInParent()
        if self._rng.random() < 0.7:
            self._change_field(child)

    def _change_repeated(self, message: Message, field: FieldDescriptor) -> None:
        items: Any = getattr(message, field.name)
        choice = self._rng.random()
        if choice < 0.15:
            message.ClearField(field.name)
        elif choice < 0.3 and items:
            del items[self._rng.randrange(len(items))]
        elif choice < 0.45 and items:
            self._repeat_one(items, field)
        else:
            self._add(items, field)

    def _repeat_one(self, items: Any, field: FieldDescriptor) -> None:
        """The same element many times: a list that is long is one of the oldest tricks."""
        one = items[self._rng.randrange(len(items))]
        items.extend([one] * self._values.length())

    def _add(self, items: Any, field: FieldDescriptor) -> None:
        for _ in range(self._rng.choice((1, 1, 2, 5))):
            if field.message_type is None:
                items.append(self._scalar(field))
            else:
                self._change_field(items.add())

    def _scalar(self, field: FieldDescriptor) -> Any:
        kind = field.cpp_type
        if kind in _BITS:
            return (self._values.signed if kind in _SIGNED else self._values.unsigned)(_BITS[kind])
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self._rng.random() < 0.5
        if field.enum_type is not None:
            return self._rng.choice((*field.enum_type.values_by_number, 99, 2**31 - 1, -1))
        return self._values.blob() if field.type == FieldDescriptor.TYPE_BYTES else self._values.text()

    # Bytes.

    def _truncated(self, sent: bytes) -> bytes:
        return sent[: self._rng.randrange(len(sent) + 1)]

    def _flipped(self, sent: bytes) -> bytes:
        changed = bytearray(sent)
        for _ in range(min(len(changed), self._rng.choice((1, 2, 8)))):
            changed[self._rng.randrange(len(changed))] = self._rng.getrandbits(8)
        return bytes(changed)

    def _with_unknown_field(self, sent: bytes) -> bytes:
        number, wire_type = self._rng.choice((19, 127, 2000, 536870911)), self._rng.choice((0, 1, 2, 5))
        values = {0: b"\x01", 1: bytes(8), 2: b"\x03abc", 5: bytes(4)}
        return sent + _varint(number << 3 | wire_type) + values[wire_type]

    def _spliced(self, sent: bytes) -> bytes:
        at = self._rng.randrange(len(sent) + 1)
        return sent[:at] + self.garbage() + sent[at:]

    def _twice(self, sent: bytes) -> bytes:
        return sent + sent[self._rng.randrange(len(sent) + 1) :]


def _messages(message: Message) -> Iterator[Message]:
    """The message, and what is in it, of long lists only the beginning."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in list(value[:20]) if field.is_repeated else [value]:
            yield from _messages(child)


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])
