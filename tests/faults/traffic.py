"""Generation in the background: requests one after the other, every answer kept with the version that it names.

Invariant: a request that gets no answer, because the engine holds it or has died, is no answer; everything else is
kept, and must be what the version that it carries would say.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import requests

PACE_S = 0.02
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished generation."""

    at: float
    """time.monotonic() when it was here."""
    versions: tuple[str, ...]
    """By which its tokens were made, in order: several where an update came in between."""
    tokens: tuple[int, ...]

    @property
    def version(self) -> str:
        """The one that it carries."""
        return self.versions[-1]


class Traffic:
    """One client of one engine, on a thread of its own."""

    def __init__(self, url: str, prompt: Sequence[int], num_tokens: int) -> None:
        self.url = url
        """Of the engine; another one's from the next request on."""
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        self._body = {"input_ids": list(prompt), "sampling_params": sampling}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    def answers(self, since: float = 0.0) -> list[Answer]:
        """Those that came at ``since`` or later."""
        with self._lock:
            return [answer for answer in self._answers if answer.at >= since]

    def wait_for(self, version: str, timeout_s: float = 20.0) -> None:
        """Until an answer carries ``version``."""
        since = time.monotonic()
        while not any(answer.version == version for answer in self.answers(since)):
            assert time.monotonic() < since + timeout_s, f"no answer of version {version} in {timeout_s:g} s"
            time.sleep(0.01)

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Every answer so far is what its version says; then forget them."""
        with self._lock:
            answers, self._answers = self._answers, []
        for answer in answers:
            assert expected.keys() >= set(answer.versions), f"{answer.versions}: a version that was never complete"
            if len(answer.versions) == 1:  # what a request that lived through an update says depends on the moment
                assert list(answer.tokens) == list(expected[answer.version]), f"mixed weights under {answer.version!r}"

    def end(self) -> None:
        """No more requests; one that the engine holds ends with the engine."""
        self._ended.set()

    def join(self) -> None:
        """Once the engine has been closed."""
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self._ended.wait(PACE_S):
                self._ask(session)

    def _ask(self, session: requests.Session) -> None:
        try:
            reply = session.post(f"{self.url}/generate", json=self._body, timeout=PATIENCE_S)
        except requests.RequestException:  # it died, or is not up again yet
            return
        if not reply.ok:
            return
        said = reply.json()
        meta = said["meta_info"]
        if meta["finish_reason"]["type"] == "length":
            versions = tuple(span["version"] for span in meta["weight_versions"])
            with self._lock:
                self._answers.append(Answer(time.monotonic(), versions, tuple(said["output_ids"])))
