"""A small HTTP client for what the trainer asks of the SGLang server itself: generation never passes the sidecar.

Invariant: every call has a deadline; an answer that is no success is a ``WeightSyncError`` with SGLang's own words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from adapter.errors import WeightSyncError

MAX_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer of /generate."""

    text: str
    """Empty if the server runs without a tokenizer."""
    output_ids: tuple[int, ...]
    weight_version: str
    """The version that the server reported with it."""
    meta_info: Mapping[str, Any]
    """Everything else that SGLang says about the answer."""


class GenerateClient:
    """``/generate`` of one SGLang server."""

    def __init__(self, server_url: str, *, timeout: float = 600.0) -> None:
        self._url = server_url.rstrip("/")
        self._timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False

    def generate(
        self,
        *,
        text: str | None = None,
        input_ids: Sequence[int] | None = None,
        sampling_params: Mapping[str, Any] | None = None,
    ) -> Generation:
        """One prompt, as text or token ids, to one answer; sampling parameters by SGLang's names."""
        if (text is None) == (input_ids is None):
            raise ValueError("give either text or input_ids")
        prompt = {"text": text} if text is not None else {"input_ids": list(input_ids or ())}
        answer = self._post("/generate", {**prompt, "sampling_params": dict(sampling_params or {})})
        meta_info = answer.get("meta_info", {})
        return Generation(
            text=answer.get("text", ""),
            output_ids=tuple(answer.get("output_ids", ())),
            weight_version=str(meta_info.get("weight_version", "")),
            meta_info=meta_info,
        )

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = self._session.post(self._url + path, json=body, timeout=self._timeout)
        except requests.exceptions.RequestException as error:
            raise WeightSyncError(f"the SGLang server at {self._url} did not answer {path}: {error}") from error
        if not response.ok:
            said = " ".join(response.text.split())[:MAX_MESSAGE]
            raise WeightSyncError(f"the SGLang server at {self._url} answered {response.status_code} to {path}: {said}")
        answer: dict[str, Any] = response.json()
        return answer

    def close(self) -> None:
        """Let the connection go."""
        self._session.close()
