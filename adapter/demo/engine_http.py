"""What the demo and the tests ask the SGLang server itself, to prove that an update did what it says.

Owns the checksums, the load from disk and the streamed generation; plain generation is `adapter.GenerateClient`.
Invariant: every call has a timeout, and an answer that is not a success is raised with the server's own words.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

_TIMEOUT_S = 60.0

# One per TP rank: every tensor's name and digest, as `/weights_checker` reports them.
RankChecksums = list[dict[str, str]]


class EngineAnswerError(Exception):
    """The server answered, but not with a success."""


@dataclass(frozen=True, slots=True)
class EngineHttp:
    """One SGLang server, by its address."""

    url: str
    timeout_s: float = _TIMEOUT_S

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy token ids."""
        tokens: list[int] = self._post("/generate", _greedy(prompt, num_tokens))["output_ids"]
        return tokens

    def stream(self, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
        """Generates as server-sent events; the last event's `meta_info`."""
        body = {**_greedy(prompt, num_tokens), "stream": True}
        last: dict[str, Any] = {}
        with (
            _session() as session,
            session.post(self.url + "/generate", json=body, timeout=self.timeout_s, stream=True) as answer,
        ):
            _check(answer, "/generate")
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    last = json.loads(line.removeprefix(b"data: "))
        if "meta_info" not in last:
            raise EngineAnswerError(f"the stream ended without a result: {last}")
        meta: dict[str, Any] = last["meta_info"]
        return meta

    def rank_checksums(self) -> RankChecksums:
        """The digests of the weights that each TP rank holds, in rank order."""
        ranks = self._post("/weights_checker", {"action": "checksum"})["ranks"]
        return [rank["checksums"] for rank in ranks]

    def load_from_disk(self, checkpoint: Path) -> None:
        """Loads a checkpoint the slow way, to compare with."""
        self._post("/update_weights_from_disk", {"model_path": str(checkpoint), "load_format": "auto"})

    def weight_version(self) -> str:
        """What the server says it serves."""
        with _session() as session:
            answer = session.get(self.url + "/model_info", timeout=self.timeout_s)
            _check(answer, "/model_info")
            return str(answer.json()["weight_version"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _session() as session:
            answer = session.post(self.url + path, json=body, timeout=self.timeout_s)
            _check(answer, path)
            parsed: dict[str, Any] = answer.json()
            return parsed


def _greedy(prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling}


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy stands between this host and itself
    return session


def _check(answer: requests.Response, path: str) -> None:
    if not answer.ok:
        raise EngineAnswerError(f"{path} answered {answer.status_code}: {answer.text[:500]}")
