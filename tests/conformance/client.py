"""The few HTTP calls that the conformance checks make. Independent of both the sidecar and the scripted engine."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import requests
from packaging.version import Version

TIMEOUT_S = 90.0
MANY_TOKENS = 300


class EngineUnderTest(NamedTuple):
    """An SGLang server, real or scripted."""

    url: str
    release: str
    tp_size: int

    def since(self, release: str) -> bool:
        """Whether it is that release or a later one."""
        return Version(self.release) >= Version(release)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=TIMEOUT_S)

    def post(self, path: str, body: object = None) -> requests.Response:
        """With a JSON body; None sends ``{}``."""
        return requests.post(self.url + path, json={} if body is None else body, timeout=TIMEOUT_S)

    def post_raw(self, path: str, data: bytes, content_type: str = "") -> requests.Response:
        headers = {"content-type": content_type} if content_type else {}
        return requests.post(self.url + path, data=data, headers=headers, timeout=TIMEOUT_S)

    def weight_version(self) -> str:
        return str(self.get("/model_info").json()["weight_version"])

    def generate(self, num_tokens: int) -> dict[str, Any]:
        parameters = {"max_new_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        reply = self.post("/generate", {"input_ids": [1, 2, 3], "sampling_params": parameters})
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    @contextmanager
    def paused(self, mode: str) -> Iterator[None]:
        """Generation stands still inside."""
        reply = self.post("/pause_generation", {"mode": mode})
        assert reply.status_code == 200, reply.text
        try:
            yield
        finally:
            reply = self.post("/continue_generation")
            assert reply.status_code == 200, reply.text

    @contextmanager
    def generating(self, num_tokens: int = MANY_TOKENS) -> Iterator[Future[dict[str, Any]]]:
        """A request is under way; it has finished at the end."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            yield pool.submit(self.generate, num_tokens)


def outcome(reply: requests.Response) -> tuple[int, bool, str]:
    """Status, success and message of whatever touches weights; exactly those two fields are in the body."""
    body = reply.json()
    assert set(body) == {"success", "message"}, body
    return reply.status_code, body["success"], body["message"]


def adapter_outcome(reply: requests.Response) -> tuple[int, bool, str, dict[str, str] | None]:
    """Status, success, message and what is loaded, of whatever touches LoRA adapters."""
    body = reply.json()
    return reply.status_code, body["success"], body["error_message"], body["loaded_adapters"]


def is_schema_error(reply: requests.Response, problem: str) -> bool:
    """Whether this is the 400 of a body that does not fit, saying ``problem``."""
    body = reply.json()
    shape = (reply.status_code, body.get("object"), body.get("type"), body.get("code"))
    return shape == (400, "error", "Bad Request", 400) and problem in body["message"]
