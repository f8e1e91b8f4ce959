"""Requests in flight all the while, as a rollout would have them.

Owns the threads. Invariant: every request ends up as an `Answer` or a `Failure`; nothing is judged here.
"""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import requests

from tests.soak.answers import Answer, Failure

PROBE = (11, 42, 7)
NUM_TOKENS = 8
# Few, so that some are made between two updates: only those can be compared.
PROBE_TOKENS = 4
NUM_STREAMS = 3
# A stream that begins again at once would leave the two cores of a small machine to nobody else.
PAUSE_S = 0.03
_AFTER_FAILURE_S = 1.0
# Longer than any time for which a fault keeps generation paused.
TIMEOUT_S = 240.0


class Traffic:
    """Streams of requests, one after the other each; the first stream asks the same all the time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self.answers: list[Answer] = []
        self.failures: list[Failure] = []

    def run(self, stream: int) -> None:
        """One stream until the end."""
        for index in itertools.count():
            if self._ended.wait(PAUSE_S):
                return
            # Every other stream has a prompt of its own each time, so that the prefix cache does not answer for it.
            self._ask(PROBE if stream == 0 else (stream, 5 + index % 500, 9), is_probe=stream == 0)

    def _ask(self, prompt: Sequence[int], *, is_probe: bool) -> None:
        started = time.monotonic()
        try:
            last = self._stream(prompt, PROBE_TOKENS if is_probe else NUM_TOKENS)
        except (requests.RequestException, ValueError, KeyError) as error:
            self.failures.append(Failure(started, time.monotonic(), f"{type(error).__name__}: {error}"[:300]))
            self._ended.wait(_AFTER_FAILURE_S)
            return
        meta = last["meta_info"]
        versions = tuple(span["version"] for span in meta["weight_versions"])
        tokens = tuple(last["output_ids"])
        self.answers.append(Answer(started, time.monotonic(), versions, tokens, is_probe))

    def _stream(self, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
        last: dict[str, Any] = {}
        with _session() as session, session.post(self._url, json=body, timeout=TIMEOUT_S, stream=True) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    last = json.loads(line.removeprefix(b"data: "))
        if last["meta_info"]["finish_reason"]["type"] != "length":
            raise ValueError(f"it ended with {last['meta_info']['finish_reason']}")
        return last

    def end(self) -> None:
        """Lets every stream finish the request in hand."""
        self._ended.set()


@contextlib.contextmanager
def generating(engine_url: str) -> Iterator[Traffic]:
    """Traffic for as long as the block lasts; if that fails, requests in flight are left to end with their server."""
    traffic = Traffic(engine_url + "/generate")
    streams = [threading.Thread(target=traffic.run, args=(stream,), daemon=True) for stream in range(NUM_STREAMS)]
    for stream in streams:
        stream.start()
    try:
        yield traffic
    finally:
        traffic.end()
    for stream in streams:
        stream.join(TIMEOUT_S)
        assert not stream.is_alive(), "a request does not end"


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy stands between this host and itself
    return session
