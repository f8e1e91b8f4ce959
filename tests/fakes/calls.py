"""What passes between a client and the scripted engine: calls as recorded, replies as sent."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.payloads import Entry


@dataclass(slots=True)
class Call:
    """One HTTP request, recorded on arrival, before any fault and whether it succeeded or not."""

    method: str
    path: str
    """Without the query."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""
    raw_body: bytes
    at: float
    """time.monotonic() on arrival."""
    entries: tuple[Entry, ...] = field(default=())
    """/update_weights_from_tensor: what each TP rank was told to load; empty if that could not be decoded."""

    @property
    def body(self) -> Any:
        """The parsed body; None if there was none or it is no JSON."""
        try:
            return json.loads(self.raw_body)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP response."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"


def json_reply(status: int, content: object) -> Reply:
    """As SGLang sends objects."""
    return Reply(status, json.dumps(content, separators=(",", ":")).encode())


def text_reply(status: int, text: str) -> Reply:
    """As SGLang answers /flush_cache: without a content type."""
    return Reply(status, text.encode(), content_type="")


def outcome(success: bool, message: str) -> Reply:
    """As SGLang answers whatever touches weights."""
    return json_reply(200 if success else 400, {"success": success, "message": message})
