"""Generation traffic as a router sends it: to every engine whose sidecar says that it is ready.

Owns the threads. Invariant: every request ends up as an `Answer` or a `Lost`; nothing is judged while it runs.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import requests

from tests.fleet.world import Site

PROMPT = (11, 42, 7)
NUM_TOKENS = 6
PAUSE_S = 0.05
LOOK_EVERY_S = 0.1
# A request may wait for as long as its engine is paused.
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer."""

    target: str
    started: float
    ended: float
    versions: tuple[str, ...]
    """Whose weights made its tokens, in order."""
    tokens: tuple[int, ...]
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """A request without one."""

    target: str
    started: float
    ended: float
    why: str


class Router:
    """One stream of requests to each engine, whenever that is ready."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._over = threading.Event()
        self._ready: dict[str, bool] = {}
        self.answers: list[Answer] = []
        self.lost: list[Lost] = []

    def look(self, site: Site) -> None:
        """The gate of one engine, until the end."""
        while not self._over.wait(LOOK_EVERY_S):
            try:
                self._ready[site.target] = requests.get(site.probe, timeout=1.0).status_code == 200
            except requests.RequestException:
                self._ready[site.target] = False

    def send(self, site: Site) -> None:
        """One stream, until the end."""
        for number in itertools.count():
            if self._over.wait(PAUSE_S):
                return
            if self._ready.get(site.target):
                # Every other prompt is another one, so that the prefix cache does not answer for it.
                self._ask(site, PROMPT if number % 2 else (5 + number % 500, 9, 2))

    def _ask(self, site: Site, prompt: tuple[int, ...]) -> None:
        started = time.monotonic()
        sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": sampling}
        try:
            answer = requests.post(f"{site.url}/generate", json=body, timeout=TIMEOUT_S)
            answer.raise_for_status()
            found = answer.json()
            versions = tuple(span["version"] for span in found["meta_info"]["weight_versions"])
            tokens = tuple(found["output_ids"])
        except (requests.RequestException, ValueError, KeyError) as error:
            self.lost.append(Lost(site.target, started, time.monotonic(), f"{type(error).__name__}: {error}"[:200]))
            return
        self.answers.append(Answer(site.target, started, time.monotonic(), versions, tokens, prompt))

    def end(self) -> None:
        """Let every stream finish the request in hand."""
        self._over.set()


@contextlib.contextmanager
def routing(sites: Sequence[Site]) -> Iterator[Router]:
    """Traffic for as long as the block lasts."""
    router = Router(sites)
    threads = [
        threading.Thread(target=work, args=(site,), daemon=True)
        for site in sites
        for work in (router.look, router.send)
    ]
    for thread in threads:
        thread.start()
    try:
        yield router
    finally:
        router.end()
    for thread in threads:
        thread.join(TIMEOUT_S)
