"""SIGTERM in every phase, and a sidecar that is restarted again and again while trainers and requests go on."""

import os
import signal
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests
import torch

from adapter import WeightSyncClient
from adapter.launch import SidecarConfig, SidecarProcess
from adapter.sidecar_stub import SidecarStub
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault, ScriptedEngine
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, LOAD, wait_until
from tests.integration.test_process import exit_code

STEPS = [
    "/pause_generation",
    "/begin_weight_update",
    LOAD,
    "/end_weight_update",
    "/flush_cache",
    "/update_weight_version",
    "/continue_generation",
]
RESTARTS = 4


@pytest.mark.parametrize("path", STEPS)
def test_sigterm_in_this_phase_lets_the_update_end_and_exits_with_0(start: StartPair, path: str) -> None:
    pair = start()
    pair.engine.fault(path, Fault.HANG)
    answers = [pair.send(pair.request("in hand", rank)) for rank in range(2)]
    wait_until(lambda: pair.engine.num_hanging == 1)
    os.kill(pair.process.pid, signal.SIGTERM)
    pair.wait_for(pb.SIDECAR_STATE_DRAINING)
    pair.engine.release()
    assert [answer.result(ANSWER_S).outcome.state for answer in answers] == [pb.UPDATE_STATE_COMMITTED] * 2
    assert exit_code(pair) == 0
    assert not pair.is_paused()
    assert pair.engine.weight_version == "version of in hand"


def test_a_rolling_restart_under_load_loses_no_update_and_no_request(tmp_path: Path) -> None:
    with ScriptedEngine(tp_size=2) as engine:
        config = SidecarConfig(
            engine_url=engine.url, listen=f"unix:{tmp_path}/sidecar.sock", log_path=tmp_path / "log", grace_s=10.0
        )
        together = Together()
        over = together.over
        sidecar = SidecarProcess(config)
        with ThreadPoolExecutor(3) as threads:
            answered = threads.submit(_generate, engine.url, over)
            sent = [threads.submit(together.train, config.listen, rank) for rank in range(2)]
            try:
                for _ in range(RESTARTS):
                    _three_more_updates(engine, sent)
                    sidecar.stop()
                    sidecar = SidecarProcess(config)
                _three_more_updates(engine, sent)
            finally:
                over.set()
                failures = [*(future.exception(60) for future in sent), answered.exception(60)]
                sidecar.stop()
        assert failures == [None] * 3
        versions, statuses = [future.result() for future in sent], answered.result()
        assert versions[0] == versions[1]
        assert engine.weight_version == str(versions[0])
    assert set(statuses) == {200}
    assert len(statuses) > RESTARTS


def _three_more_updates(engine: ScriptedEngine, sent: list[Future[int]]) -> None:
    before = engine.posts(LOAD)
    wait_until(lambda: engine.posts(LOAD) > before + 3 or any(rank.done() for rank in sent))
    for rank in sent:
        if rank.done():
            rank.result()  # what stopped it


def test_the_first_answer_of_a_sidecar_that_was_restarted_knows_the_engine(tmp_path: Path) -> None:
    with ScriptedEngine(tp_size=2) as engine:
        engine.fault("/server_info", Fault.LATE, delay_s=1.0)
        config = SidecarConfig(engine_url=engine.url, listen=f"unix:{tmp_path}/sidecar.sock", log_path=tmp_path / "log")
        with SidecarProcess(config), closing(SidecarStub(config.listen)) as stub:
            assert stub.capabilities().HasField("engine")
            assert stub.status().HasField("engine")


def test_an_engine_that_says_nothing_holds_up_the_first_answer_for_no_longer_than_its_caller_waits(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = SidecarConfig(engine_url=url, listen=f"unix:{tmp_path}/sidecar.sock", log_path=tmp_path / "log")
        with SidecarProcess(config), closing(SidecarStub(config.listen)) as stub:
            hasty = stub.rpc.GetStatus(pb.GetStatusRequest(), timeout=1.5)
            patient = stub.status()
    assert hasty.state == patient.state == pb.SIDECAR_STATE_ENGINE_UNREACHABLE
    assert "has not answered yet" in hasty.reason


class Together:
    """Both ranks go on to the same next version, or both stop."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._go = True
        self._meet = threading.Barrier(2, action=self._decide)

    def _decide(self) -> None:
        self._go = not self.over.is_set()

    def go_on(self) -> bool:
        self._meet.wait(ANSWER_S)
        return self._go

    def train(self, target: str, rank: int) -> int:
        """Updates until it is over, each of which must commit; returns the last version."""
        version = 0
        with WeightSyncClient(target, rank=rank, tp_size=2) as client:
            while self.go_on():
                version += 1
                weights = [("layer.0.weight", torch.full((2, 3), float(version)))]
                result = client.update_weights(weights, version=str(version), timeout=60)
                assert result.weight_version == str(version)
        return version


def _generate(url: str, over: threading.Event) -> list[int]:
    statuses = []
    with requests.Session() as session:
        while not over.is_set():
            body = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
            statuses.append(session.post(f"{url}/generate", json=body, timeout=30).status_code)
    return statuses
