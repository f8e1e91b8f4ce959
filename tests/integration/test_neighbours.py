"""What 256 other clients cost an update: watchers, pollers, some that read slowly and some that never read at all.

Medians and percentiles of one run are compared with each other, never with a clock.
"""

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adapter.launch import free_port
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.integration.conftest import StartPair
from tests.integration.support import Pair

NUM_CLIENTS = 256
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
UPDATES, LOOKS, ROUNDS = 40, 150, 5
OWN = ("grpc.use_local_subchannel_pool", 1)
POLL_S = 1.0


def median_update_s(pair: Pair, name: str) -> float:
    def one(number: int) -> float:
        requests = [pair.request(f"{name} {number}", rank) for rank in range(2)]
        begun = time.perf_counter()
        for answer in [pair.send(request) for request in requests]:
            answer.result(20)
        return time.perf_counter() - begun

    return statistics.median(one(number) for number in range(UPDATES))


def health_p99_s(pair: Pair) -> float:
    check = health_pb2_grpc.HealthStub(pair.channel).Check

    def one() -> float:
        begun = time.perf_counter()
        check(health_pb2.HealthCheckRequest(), timeout=10)
        return time.perf_counter() - begun

    return statistics.quantiles([one() for _ in range(LOOKS)], n=100)[98]


@contextmanager
def crowd(pair: Pair, http_port: int) -> Iterator[None]:
    """256 clients: an eighth each says nothing, a preface, or half a question to a probe; the rest watch, unread.

    Every eighth of those polls the status, too.
    """
    eighth = NUM_CLIENTS // 8
    over = threading.Event()
    with ExitStack() as stack:
        for _ in range(eighth):
            stack.enter_context(_silent(pair.target, b""))
            stack.enter_context(_silent(pair.target, PREFACE))
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", http_port)))).sendall(b"GET /met")
        channels = [
            stack.enter_context(grpc.insecure_channel(pair.target, options=[OWN]))
            for _ in range(NUM_CLIENTS - 3 * eighth)
        ]
        for channel in channels:  # nobody ever takes from these streams
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        threads = stack.enter_context(ThreadPoolExecutor(1))
        threads.submit(_poll, channels[::8], over)
        try:
            for channel in channels:
                grpc.channel_ready_future(channel).result(20)
            yield
        finally:
            over.set()


def _silent(target: str, hello: bytes) -> "closing[socket.socket]":
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(target.removeprefix("unix:"))
    sock.sendall(hello)
    return closing(sock)


def _poll(channels: list[grpc.Channel], over: threading.Event) -> None:
    """Each asks once per ``POLL_S``, one after the other."""
    while not over.is_set():
        for channel in channels:
            pb_grpc.WeightSyncServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=20)
            over.wait(POLL_S / len(channels))


def compared(alone: Callable[[], float], crowded: Callable[[], float], pair: Pair, port: int) -> float:
    """The ratio of the best of ``ROUNDS`` each, in turn: what else this machine does hits both."""
    quiet, loud = [], []
    for _ in range(ROUNDS):
        quiet.append(alone())
        with crowd(pair, port):
            loud.append(crowded())
    return min(loud) / min(quiet)


def test_256_clients_slow_an_update_by_a_fifth_at_most_and_health_by_four_fifths(start: StartPair) -> None:
    port = free_port()
    pair = start("--http-listen", f"127.0.0.1:{port}")
    numbers = iter(range(1000))
    for _ in range(2):  # warm up
        median_update_s(pair, f"warm {next(numbers)}")

    def update() -> float:
        return median_update_s(pair, f"u{next(numbers)}")

    assert compared(update, update, pair, port) <= 1.2
    busy = threading.Event()

    def with_an_update() -> float:
        with ThreadPoolExecutor(1) as thread:
            updating = thread.submit(_update_until, pair, busy, f"h{next(numbers)}")
            try:
                return health_p99_s(pair)
            finally:
                busy.set()
                updating.result(30)
                busy.clear()

    assert compared(lambda: health_p99_s(pair), with_an_update, pair, port) <= 5.0


def _update_until(pair: Pair, over: threading.Event, name: str) -> None:
    number = 0
    while not over.is_set():
        number += 1
        pair.update(f"{name} {number}")
