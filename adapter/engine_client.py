"""The HTTP of one SGLang server, as the trainer asks it: generation and control, never weights.

Invariant: every call has a deadline; an answer that is no success is a ``WeightSyncError`` with SGLang's own words, a
server that is not there an ``EngineUnreachable``. Nothing is asked twice. Safe to use from several threads.
"""

import json
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import requests

from adapter.errors import EngineUnreachable, WeightSyncError

MAX_MESSAGE = 500
_EVENT = b"data: "
_END = b"[DONE]"


class EngineClient:
    """One server, by its address. Every call has a connection of its own: SGLang drops idle ones after 5 seconds."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, timeout_s: float) -> Any:
        """The answer's JSON, or its text."""
        with self._asked("GET", path, None, timeout_s) as response:
            return self._content(path, response)

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        """The answer's JSON, or its text."""
        with self._asked("POST", path, body, timeout_s) as response:
            return self._content(path, response)

    def events(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Generator[Any, None, None]:
        """The JSON of each server-sent event; closing the generator ends the request at the server too."""
        deadline = time.monotonic() + timeout_s
        with self._asked("POST", path, body, timeout_s, stream=True) as response:
            for line in response.iter_lines():
                if line.startswith(_EVENT) and line != _EVENT + _END:
                    yield self._event(path, line.removeprefix(_EVENT))
                if time.monotonic() > deadline:
                    raise WeightSyncError(f"the stream of {path} at {self.url} did not end within {timeout_s:g} s")

    def answers(self, timeout_s: float = 5.0) -> bool:
        """Whether it is up. /health would generate a token, and answers 503 while generation is paused."""
        try:
            self.get("/model_info", timeout_s)
        except WeightSyncError:
            return False
        return True

    def _event(self, path: str, data: bytes) -> Any:
        event = self._parsed(path, data)
        if isinstance(event, dict) and "error" in event:
            raise WeightSyncError(f"the SGLang server at {self.url} broke off {path}: {_words(event)}")
        return event

    def _content(self, path: str, response: requests.Response) -> Any:
        if response.headers.get("content-type", "").startswith("application/json"):
            return self._parsed(path, response.content)
        return response.text

    def _parsed(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            said = _short(data.decode(errors="replace"))
            raise WeightSyncError(
                f"the answer of the SGLang server at {self.url} to {path} is no JSON, though it says so: {said}"
            ) from error

    @contextmanager
    def _asked(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float, *, stream: bool = False
    ) -> Iterator[requests.Response]:
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy stands between a trainer and its server
                response = session.request(method, self.url + path, json=body, timeout=timeout_s, stream=stream)
                with response:
                    self._check(path, response)
                    yield response
        except requests.exceptions.Timeout as error:
            raise WeightSyncError(
                f"the SGLang server at {self.url} did not answer {path} within {timeout_s:g} s"
            ) from error
        except requests.exceptions.InvalidJSONError as error:
            raise ValueError(f"the request to {path} holds what JSON has no form for: {error}") from error
        except requests.exceptions.RequestException as error:
            raise EngineUnreachable(f"the SGLang server at {self.url} did not answer {path}: {error}") from error

    def _check(self, path: str, response: requests.Response) -> None:
        if not response.ok:
            said = _said(response)
            raise WeightSyncError(f"the SGLang server at {self.url} answered {response.status_code} to {path}: {said}")


def _said(response: requests.Response) -> str:
    """What a refusal says, out of the several forms that SGLang has for it."""
    try:
        return _words(response.json())
    except requests.exceptions.JSONDecodeError:
        return _short(response.text)


def _words(body: Any) -> str:
    while isinstance(body, dict) and (inner := body.get("error") or body.get("message")):
        body = inner
    return _short(body if isinstance(body, str) else json.dumps(body))


def _short(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE]
