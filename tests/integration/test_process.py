"""The sidecar's process: start, size, one per socket, and an orderly end."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from adapter.launch import SidecarConfig, SidecarProcess, free_port
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.fakes import Fault, ScriptedEngine
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, LOAD, Pair, refusal, wait_until

START_S = 5.0  # about 0.5 s on an idle machine; this one may be loaded
RESIDENT_BYTES = 80 << 20


def serve(engine_url: str, listen: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "sidecar", "serve", "--engine-url", engine_url, "--listen", listen]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(kilobytes) << 10


def exit_code(pair: Pair, timeout_s: float = ANSWER_S) -> int:
    assert pair.process.process.wait_exit(timeout_s), "the sidecar did not end"
    result = os.waitid(os.P_PID, pair.process.pid, os.WEXITED | os.WNOWAIT)
    assert result is not None
    assert result.si_code == os.CLD_EXITED, f"ended by signal {result.si_status}"
    return result.si_status


def test_it_serves_soon_after_its_start_whether_the_engine_is_up_or_not(tmp_path: Path) -> None:
    config = SidecarConfig(
        engine_url=f"http://127.0.0.1:{free_port()}", listen=f"unix:{tmp_path}/s.sock", log_path=tmp_path / "log"
    )
    started = time.monotonic()
    with SidecarProcess(config):
        assert time.monotonic() - started < START_S


def test_it_stays_small_after_many_updates_and_large_manifests(pair: Pair) -> None:
    for number in range(5):
        pair.update(f"small {number}", num_buckets=4)
    assert resident_bytes(pair.process.pid) < RESIDENT_BYTES
    request = pair.request("large manifest", 0)
    bucket = request.manifest.manifest.buckets[0]
    bucket.size_bytes = 1 << 30
    bucket.tensors.extend(
        pb.TensorSpec(name=f"model.layers.{n}.mlp.experts.weight", dtype=pb.DATA_TYPE_BFLOAT16, shape=[4], size_bytes=8)
        for n in range(20_000)
    )
    assert refusal(pair.send(request)).reason == "INVALID_HANDLE"  # the memory is smaller than that bucket
    assert resident_bytes(pair.process.pid) < RESIDENT_BYTES


def test_a_second_sidecar_on_the_socket_is_refused_and_the_first_serves_on(pair: Pair) -> None:
    done = serve(pair.engine.url, pair.target)
    assert done.returncode == 3
    assert f"another sidecar serves {pair.target}; give this one another socket" in done.stderr
    assert "Traceback" not in done.stderr
    assert pair.update("still here").state == pb.UPDATE_STATE_COMMITTED


def test_a_second_sidecar_on_the_port_is_refused(tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with SidecarProcess(SidecarConfig(engine_url="http://127.0.0.1:9", listen=listen, log_path=tmp_path / "log")):
        done = serve("http://127.0.0.1:9", listen)
    assert done.returncode == 3
    assert f"cannot listen on {listen}; is another process there?" in done.stderr
    assert "Traceback" not in done.stderr


def test_beyond_loopback_it_listens_only_if_told_so_and_then_warns(tmp_path: Path) -> None:
    port = free_port()
    refused = serve("http://127.0.0.1:9", f"0.0.0.0:{port}")
    assert (refused.returncode, "or say --insecure" in refused.stderr) == (2, True)
    with (
        ScriptedEngine(tp_size=2) as engine,
        closing(Pair(engine, tmp_path, ["--insecure"], f"0.0.0.0:{port}")) as pair,
    ):
        with grpc.insecure_channel(f"127.0.0.2:{port}") as channel:  # of all addresses
            rpc = pb_grpc.WeightSyncServiceStub(channel)
            wait_until(lambda: rpc.GetStatus(pb.GetStatusRequest(), timeout=ANSWER_S).state == pb.SIDECAR_STATE_READY)
        assert pair.update("over tcp").state == pb.UPDATE_STATE_COMMITTED
        warning = f"WARNING sidecar.server: 0.0.0.0:{port} is open (--insecure): every host that reaches it may change"
        assert warning in pair.process.process.log_text()


def test_on_loopback_nobody_is_warned(tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    config = SidecarConfig(
        engine_url="http://127.0.0.1:9", listen=listen, log_path=tmp_path / "log", args=("--insecure",)
    )
    with SidecarProcess(config) as sidecar:
        assert "TLS" not in sidecar.process.log_text()


def test_a_socket_that_a_killed_sidecar_left_is_taken_over(tmp_path: Path) -> None:
    config = SidecarConfig(engine_url="http://127.0.0.1:9", listen=f"unix:{tmp_path}/s.sock", log_path=tmp_path / "log")
    with SidecarProcess(config) as first:
        os.kill(first.pid, signal.SIGKILL)
        assert first.process.wait_exit(5)
        assert (tmp_path / "s.sock").exists()
        with SidecarProcess(config):
            pass


def test_the_socket_is_for_its_user_alone(pair: Pair) -> None:
    mode = Path(pair.target.removeprefix("unix:")).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) & 0o077 == 0


def test_sigterm_in_quiet_times_ends_it_with_0(start: StartPair) -> None:
    pair = start()
    os.kill(pair.process.pid, signal.SIGTERM)
    assert exit_code(pair) == 0


def test_sigterm_during_an_update_lets_it_end_and_takes_no_other(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("in hand", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    os.kill(pair.process.pid, signal.SIGTERM)
    pair.wait_for(pb.SIDECAR_STATE_DRAINING)
    refused = refusal(pair.send(pair.request("too late", 0)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    pair.engine.release()
    assert [answer.result(ANSWER_S).outcome.state for answer in answers] == [pb.UPDATE_STATE_COMMITTED] * 2
    assert exit_code(pair) == 0
    assert not pair.is_paused()


def test_sigterm_while_ranks_are_collected_tells_them_and_touches_nothing(start: StartPair) -> None:
    pair = start()
    waiting = pair.send(pair.request("collecting", 0))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    os.kill(pair.process.pid, signal.SIGTERM)
    refused = refusal(waiting)
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert "the sidecar is stopping" in refused.message
    assert exit_code(pair) == 0
    assert pair.posts() == []


@pytest.mark.parametrize("again", [True, False], ids=["second-signal", "drain-time-over"])
def test_an_update_that_does_not_end_cannot_hold_the_process_up(start: StartPair, again: bool) -> None:
    pair = start("--drain-timeout", "60" if again else "0.5")
    pair.engine.fault(LOAD, Fault.HANG)
    answers = [pair.send(pair.request("stuck", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    os.kill(pair.process.pid, signal.SIGTERM)
    pair.wait_for(pb.SIDECAR_STATE_DRAINING)
    if again:
        os.kill(pair.process.pid, signal.SIGTERM)
    assert exit_code(pair, timeout_s=10.0) == 1
    for answer in answers:
        assert answer.exception(5) is not None
    pair.engine.release()
    wait_until(lambda: set(pair.counts()) == {1})  # the engine goes on, and reads the memory


def test_it_serves_on_a_loopback_port(tmp_path: Path) -> None:
    port = free_port()
    config = SidecarConfig(engine_url="http://127.0.0.1:9", listen=f"127.0.0.1:{port}", log_path=tmp_path / "log")
    with SidecarProcess(config), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
