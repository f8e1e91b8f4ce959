"""``/generate`` of an SGLang server, one prompt at a time, with a typed answer: generation never passes the sidecar.

Invariant: every call has a deadline; an answer that is no success is a ``WeightSyncError`` with SGLang's own words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter.engine_client import EngineClient


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
        self._engine = EngineClient(server_url)
        self._timeout = timeout

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
        body = {**prompt, "sampling_params": dict(sampling_params or {})}
        answer: dict[str, Any] = self._engine.post("/generate", body, self._timeout)
        meta_info = answer.get("meta_info", {})
        return Generation(
            text=answer.get("text", ""),
            output_ids=tuple(answer.get("output_ids", ())),
            weight_version=str(meta_info.get("weight_version", "")),
            meta_info=meta_info,
        )

    def close(self) -> None:
        """Nothing is held open between calls; kept for callers that say when they are done."""
