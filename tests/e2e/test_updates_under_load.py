"""A hundred updates in a row while others generate: nothing hangs, nothing fails.

Pausing, loading and flushing between requests in flight is where designs of this kind have hung on their second
update.
"""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapter import UpdateResult, WeightSyncClient
from adapter.demo.engine_http import EngineHttp
from adapter.demo.tiny_model import NamedTensors, random_weights
from tests.e2e.engines import Stack, on_tp2

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NUM_UPDATES = 100
NUM_STREAMS = 4
TOKENS_PER_REQUEST = 12


class Generation:
    """Streams of requests, one after the other each, until they are told to end."""

    def __init__(self, http: EngineHttp) -> None:
        self._http = http
        self._ended = threading.Event()
        self.finished = [0] * NUM_STREAMS
        self.crossed_updates = [0] * NUM_STREAMS

    def run(self, stream: int) -> None:
        """One stream. Whatever a request raises ends it and reaches the test through its future."""
        while not self._ended.is_set():
            # Every request has a prompt of its own, so that the prefix cache does not answer in its place.
            meta = self._http.stream([stream, 5 + self.finished[stream] % 500, 9], TOKENS_PER_REQUEST)
            assert meta["finish_reason"]["type"] == "length"
            assert meta["completion_tokens"] == TOKENS_PER_REQUEST
            self.finished[stream] += 1
            # One span per version that made tokens of this answer.
            self.crossed_updates[stream] += len(meta["weight_versions"]) > 1

    def end(self) -> None:
        """Lets every stream finish the request in hand."""
        self._ended.set()


@contextlib.contextmanager
def generating(http: EngineHttp) -> Iterator[Generation]:
    """Requests in flight all the while; a failed one fails the test."""
    generation = Generation(http)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(generation.run, stream) for stream in range(NUM_STREAMS)]
        try:
            yield generation
        finally:
            generation.end()
        for stream in streams:
            stream.result(timeout=60)


@contextlib.contextmanager
def clients(stack: Stack) -> Iterator[list[WeightSyncClient]]:
    """One client per rank, each used by one thread at a time."""
    size = stack.spec.tp_size
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(WeightSyncClient(stack.target, rank=r, tp_size=size)) for r in range(size)]


def send(clients: list[WeightSyncClient], weights: NamedTensors, version: str) -> list[UpdateResult]:
    """All ranks at once."""
    with ThreadPoolExecutor(len(clients)) as pool:
        calls = [pool.submit(client.update_weights, weights, version=version, timeout=60.0) for client in clients]
        return [call.result() for call in calls]


@on_tp2
def test_a_hundred_updates_under_four_generation_streams(stack: Stack) -> None:
    weights = {seed: random_weights(seed) for seed in (1, 2)}
    stack.update(1)  # the first one greets the engine's loaders
    posts = stack.num_posts()
    with clients(stack) as ranks, generating(stack.http) as generation:
        for index in range(NUM_UPDATES):
            results = send(ranks, weights[1 + index % 2], stack.new_version())
            assert all(result.cache_flushed for result in results)
    assert stack.num_posts() - posts == NUM_UPDATES
    assert min(generation.crossed_updates) > 0, "updates that no request felt prove nothing"
    assert_serves(stack, seed=2)


def assert_serves(stack: Stack, seed: int) -> None:
    """The weights are those of the last update, whole and on every rank."""
    sent = stack.http.rank_checksums()
    stack.load_from_disk(seed)
    assert stack.http.rank_checksums() == sent
