"""Bytes pass unchanged, and are counted."""

import http.client
from pathlib import Path
from threading import Thread

from benchmarks.byte_counter import ByteCounter
from benchmarks.sync.direct import Poster
from tests.fakes import ScriptedEngine


def test_bodies_of_one_path_are_found_among_other_calls() -> None:
    with ScriptedEngine() as engine, ByteCounter(f"127.0.0.1:{engine.port}", "127.0.0.1:0") as counter:
        poster = Poster(f"http://127.0.0.1:{counter.port}", uses_sessions=False)
        poster._post("/pause_generation", {"mode": "retract"})
        before = counter.sent
        poster._post("/flush_cache", {})
        poster._post("/update_weight_version", {"new_version": "2", "abort_all_requests": False})
        poster.close()
        bodies = counter.http_bodies("/update_weight_version")
        assert bodies == [b'{"new_version": "2", "abort_all_requests": false}']
        assert before < counter.sent < before + 1000
        assert engine.weight_version == "2"


def test_nothing_is_counted_from_before_the_reset(tmp_path: Path) -> None:
    with (
        ScriptedEngine() as engine,
        ByteCounter(f"127.0.0.1:{engine.port}", f"unix:{tmp_path}/counted.sock") as outer,
        ByteCounter(f"unix:{tmp_path}/counted.sock", "127.0.0.1:0") as inner,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", inner.port, timeout=10)
        connection.request("GET", "/model_info")
        answer = connection.getresponse().read()
        assert inner.sent == outer.sent > 0
        assert inner.received == outer.received > len(answer)
        outer.reset()
        assert (outer.sent, outer.received) == (0, 0)
        connection.close()


def test_closing_cuts_connections_and_leaves_no_thread() -> None:
    with ScriptedEngine() as engine:
        counter = ByteCounter(f"127.0.0.1:{engine.port}", "127.0.0.1:0")
        connection = http.client.HTTPConnection("127.0.0.1", counter.port, timeout=10)
        connection.request("GET", "/model_info")
        connection.getresponse().read()
        threads: list[Thread] = list(counter._threads)
        counter.close()
        connection.close()
        assert not any(thread.is_alive() for thread in threads)
