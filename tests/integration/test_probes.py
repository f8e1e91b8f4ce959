"""Probes and metrics over plain HTTP, from a real sidecar: what they say, and what they put up with."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from adapter.launch import free_port
from sidecar.probes import MAX_CONNECTIONS
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, Pair, refusal, wait_until


class Probed:
    """A pair and its probes' port."""

    def __init__(self, start: StartPair, *args: str) -> None:
        self.port = free_port()
        self.pair: Pair = start("--http-listen", f"127.0.0.1:{self.port}", *args)

    def ask(self, path: str, method: str = "GET") -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    @contextmanager
    def silent(self, number: int) -> Iterator[None]:
        """Connections that ask half a question and never read."""
        with ExitStack() as stack:
            for _ in range(number):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=5))
                sock.sendall(b"GET /livez HTT")
            yield


def test_livez_readyz_and_metrics_are_answered(start: StartPair) -> None:
    probed = Probed(start)
    assert probed.ask("/livez") == (200, "alive\n")
    assert probed.ask("/readyz?verbose") == (200, "ready\n")
    assert probed.ask("/readyz", "HEAD") == (200, "")
    probed.pair.update("7")
    status, text = probed.ask("/metrics")
    assert status == 200
    for line in (
        'weightsync_state{state="ready"} 1.0',
        'weightsync_updates_total{outcome="committed"} 1.0',
        'weightsync_calls_total{code="OK",method="UpdateWeights"} 2.0',
        'weightsync_rank_wait_seconds_count{rank="1"} 1.0',
        "weightsync_pause_seconds_count 1.0",
        "weightsync_buckets_total 1.0",
        "weightsync_loaded_bytes_total 256.0",
        "weightsync_engine_epoch 1.0",
        "weightsync_engine_reachable 1.0",
        "weightsync_update_in_hand_seconds 0.0",
        "weightsync_weight_version NaN",
        'engine_version="0.5.23"',
    ):
        assert line in text, line


def test_a_dirty_engine_is_not_ready_and_alive_and_its_reason_stays_inside(start: StartPair) -> None:
    probed = Probed(start)
    probed.pair.engine.fault(LOAD, Fault.CUT)
    for answer in [probed.pair.send(probed.pair.request("breaks", rank)) for rank in range(2)]:
        refusal(answer)
    assert probed.ask("/readyz") == (503, "dirty\n")
    assert probed.ask("/livez") == (200, "alive\n")
    assert 'weightsync_refusals_total{reason="UPDATE_FAILED"} 2.0' in probed.ask("/metrics")[1]
    probed.pair.update("heals")
    assert probed.ask("/readyz") == (200, "ready\n")


def test_an_update_that_is_applied_leaves_it_ready(start: StartPair) -> None:
    probed = Probed(start)
    probed.pair.engine.fault(LOAD, Fault.HANG)
    answers = [probed.pair.send(probed.pair.request("slow", rank)) for rank in range(2)]
    wait_until(lambda: probed.pair.engine.num_hanging == 1)
    assert probed.ask("/readyz") == (200, "applying\n")
    assert "weightsync_update_in_hand_seconds 0.0\n" not in probed.ask("/metrics")[1]
    probed.pair.engine.release()
    assert all(answer.result(20).outcome.state == pb.UPDATE_STATE_COMMITTED for answer in answers)


def test_what_is_not_there_or_would_write_is_refused(start: StartPair) -> None:
    probed = Probed(start)
    assert probed.ask("/update") == (404, "there is only /livez, /metrics, /readyz\n")
    assert probed.ask("/readyz", "POST")[0] == 405
    with socket.create_connection(("127.0.0.1", probed.port), timeout=5) as sock:
        sock.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert sock.recv(100) == b""
    assert probed.ask("/livez")[0] == 200


def test_clients_that_never_finish_do_not_keep_others_out(start: StartPair) -> None:
    probed = Probed(start)
    with probed.silent(MAX_CONNECTIONS - 4):
        assert probed.ask("/readyz") == (200, "ready\n")
    with probed.silent(MAX_CONNECTIONS + 8), pytest.raises((http.client.HTTPException, OSError)):
        probed.ask("/readyz")
    wait_until(lambda: _answers(probed))


def _answers(probed: Probed) -> bool:
    try:
        return probed.ask("/readyz") == (200, "ready\n")
    except (http.client.HTTPException, OSError):
        return False


def test_a_lame_duck_says_that_it_is_not_ready_and_still_takes_updates(start: StartPair) -> None:
    probed = Probed(start, "--lame-duck", "1.5")
    os.kill(probed.pair.process.pid, signal.SIGTERM)
    wait_until(lambda: probed.ask("/readyz")[0] == 503)
    assert probed.pair.update("just in time").state == pb.UPDATE_STATE_COMMITTED
    assert probed.ask("/livez") == (200, "alive\n")


def test_a_second_sidecar_for_the_engine_is_refused(start: StartPair, tmp_path: Path) -> None:
    pair = start()
    url = pair.engine.url.replace("127.0.0.1", "localhost")
    argv = [sys.executable, "-m", "sidecar", "serve", "--engine-url", url, "--listen", f"unix:{tmp_path}/other.sock"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "another sidecar on this host serves the engine" in done.stderr) == (3, True)
    assert pair.update("still here").state == pb.UPDATE_STATE_COMMITTED


def test_the_log_can_be_json_with_fields(start: StartPair) -> None:
    pair = start("--log-format", "json")
    pair.update("an id")
    lines = [json.loads(line) for line in pair.process.process.log_text().splitlines() if line.startswith("{")]
    (ended,) = [line for line in lines if line.get("update_id") == "an id"]
    assert ended["version"] == "version of an id"
    assert "committed, 1 of 1 buckets, 128 bytes per rank" in ended["message"]


def test_the_engines_keys_open_its_routes_and_are_never_shown(start: StartPair, tmp_path: Path) -> None:
    keys = {"api": "an-api-key-7431", "admin": "an-admin-key-9275"}
    for name, key in keys.items():
        (tmp_path / name).write_text(key)
    files = [f"--engine-{name}-key-file={tmp_path / name}" for name in keys]
    probed = Probed(
        lambda *args, **engine: start(*args, api_key=keys["api"], admin_api_key=keys["admin"], **engine),
        *files,
        "--log-level",
        "debug",
    )
    assert probed.pair.update("7").state == pb.UPDATE_STATE_COMMITTED
    told = probed.pair.process.process.log_text() + str(probed.pair.status()) + probed.ask("/metrics")[1]
    told += Path(f"/proc/{probed.pair.process.pid}/cmdline").read_text()
    for key in keys.values():
        assert key not in told


def test_a_wrong_admin_key_stops_an_update_before_anything_is_touched(start: StartPair, tmp_path: Path) -> None:
    (tmp_path / "api").write_text("right-7431")
    (tmp_path / "admin").write_text("wrong-9275")
    pair = start(
        f"--engine-api-key-file={tmp_path}/api",
        f"--engine-admin-key-file={tmp_path}/admin",
        api_key="right-7431",
        admin_api_key="another-1188",
    )
    refused = [refusal(answer) for answer in [pair.send(pair.request("locked out", rank)) for rank in range(2)]]
    assert "it wants its --admin-api-key" in refused[0].message
    assert "wrong-9275" not in refused[0].message
    assert pair.engine.posts(LOAD) == 0
