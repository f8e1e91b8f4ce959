"""What the doctor asks of an engine over HTTP, each call on a connection of its own.

Invariant: a key goes into one header and nowhere else (``sidecar.engine.http``).
"""

import contextlib
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from sidecar.config import EngineKeys
from sidecar.engine.http import EngineHttp
from sidecar.errors import EngineError
from sidecar.secret import Secret


async def asked(url: str, key: str, path: str, timeout_s: float) -> dict[str, Any]:
    """GET ``path``: the answer, a JSON object; raises ``EngineError``."""
    with contextlib.closing(_keyed(url, key)) as http:
        return await http.get(path, timeout_s)


async def posted(url: str, key: str, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
    """POST ``body``; raises ``EngineError``."""
    with contextlib.closing(_keyed(url, key)) as http:
        await http.post(path, body, timeout_s)


async def skew(url: str, key: str, now: Callable[[], float], timeout_s: float) -> float | None:
    """By how many seconds the server's clock is ahead, by the Date of an answer; None if it does not tell."""
    with contextlib.closing(_keyed(url, key)) as http:
        try:
            before = now()
            date = _seconds(await http.date("/model_info", timeout_s))
            after = now()
        except EngineError:
            return None
    # It is cut to whole seconds: right is anything within the second that it names.
    return None if date is None else date + 0.5 - (before + after) / 2


def _keyed(url: str, key: str) -> EngineHttp:
    return EngineHttp(url, EngineKeys(api=Secret(key), admin=Secret(key)))


def _seconds(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None
