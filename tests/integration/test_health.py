"""What orchestrators and tools see: health, reflection, status, the command line, metrics."""

import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from adapter import EngineUnreachable, WeightSyncClient
from adapter.launch import free_port
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, Pair, refusal, wait_until

SERVICE = "sidecar.v1.WeightSyncService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health(pair: Pair, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health_pb2_grpc.HealthStub(pair.channel).Check(request, timeout=5).status)


def break_an_update(pair: Pair) -> None:
    pair.engine.fault(LOAD, Fault.CUT)
    for answer in [pair.send(pair.request("breaks", rank)) for rank in range(2)]:
        assert refusal(answer).reason == "UPDATE_FAILED"


def command(pair: Pair, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "sidecar", *arguments, "--target", pair.target]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def test_liveness_and_readiness_are_served_apart(start: StartPair) -> None:
    pair = start()
    wait_until(lambda: health(pair, SERVICE) == SERVING)
    assert health(pair, "") == SERVING
    break_an_update(pair)
    wait_until(lambda: health(pair, SERVICE) == NOT_SERVING)
    assert health(pair, "") == SERVING, "a dirty engine is no reason to restart the sidecar"
    pair.update("heals")
    wait_until(lambda: health(pair, SERVICE) == SERVING)


def test_a_watcher_that_leaves_does_not_deafen_the_others(start: StartPair) -> None:
    pair = start()
    wait_until(lambda: health(pair, SERVICE) == SERVING)
    stub, request = health_pb2_grpc.HealthStub(pair.channel), health_pb2.HealthCheckRequest(service=SERVICE)
    leaves, stays = stub.Watch(request), stub.Watch(request)
    assert (next(leaves).status, next(stays).status) == (SERVING, SERVING)
    leaves.cancel()
    break_an_update(pair)
    assert next(stays).status == NOT_SERVING
    pair.update("heals")
    assert next(stays).status == SERVING
    stays.cancel()


def test_a_watcher_sees_readiness_flip_and_come_back(start: StartPair) -> None:
    pair = start()
    wait_until(lambda: health(pair, SERVICE) == SERVING)
    seen: list[int] = []
    stream = health_pb2_grpc.HealthStub(pair.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    watcher = threading.Thread(target=collect, args=(stream, seen))
    watcher.start()
    wait_until(lambda: seen == [SERVING])
    break_an_update(pair)
    wait_until(lambda: seen == [SERVING, NOT_SERVING])
    pair.update("heals")
    wait_until(lambda: seen == [SERVING, NOT_SERVING, SERVING])
    stream.cancel()
    watcher.join()


def collect(stream: Iterator[health_pb2.HealthCheckResponse], seen: list[int]) -> None:
    """Until the stream is cancelled."""
    with suppress(grpc.RpcError):
        for answer in stream:
            seen.append(int(answer.status))  # noqa: PERF401 - one by one, as they come


def test_an_engine_that_is_down_makes_the_sidecar_unready_but_not_dead_until_it_is_back(start: StartPair) -> None:
    pair = start()
    pair.engine.die()
    wait_until(lambda: health(pair, SERVICE) == NOT_SERVING)
    assert health(pair, "") == SERVING
    done = command(pair, "health")
    assert (done.returncode, done.stdout.startswith("NOT_SERVING: ")) == (1, True)
    assert pair.engine.url in done.stdout
    assert command(pair, "health", "--liveness").returncode == 0
    assert not pair.rpc.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=5).HasField("engine")
    status = pair.status()
    assert (status.state, status.weight_version) == (pb.SIDECAR_STATE_ENGINE_UNREACHABLE, "")
    assert f"the engine at {pair.engine.url} cannot be reached" in status.reason
    refused = refusal(pair.send(pair.request("gone"), timeout_s=5))  # the first rank learns it at once
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNREACHABLE")
    assert "is the SGLang server up?" in refused.message
    with WeightSyncClient(pair.target, rank=0, tp_size=2) as client:
        with pytest.raises(EngineUnreachable, match="waits for its engine"):
            client.wait_ready(timeout=0.1)
        pair.engine.restart()
        client.wait_ready(timeout=10)
    status = pair.status()
    assert (status.engine.version, status.weight_version) == ("0.5.23", "default")
    assert (status.state, status.engine.epoch) == (pb.SIDECAR_STATE_UNSYNCED, 2)
    assert "the engine has started and serves its checkpoint" in status.reason
    assert health(pair, SERVICE) == NOT_SERVING
    assert pair.update("back").state == pb.UPDATE_STATE_COMMITTED
    wait_until(lambda: health(pair, SERVICE) == SERVING)


def test_reflection_lists_the_service(pair: Pair) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(pair.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=5)
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
    (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=5)
    assert answer.file_descriptor_response.file_descriptor_proto


def test_the_command_line_tells_a_person_what_is_going_on(pair: Pair) -> None:
    pair.update("for a person")
    assert command(pair, "health").stdout == "SERVING\n"
    waiting = pair.send(pair.request("second", 1))
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    done = command(pair, "status")
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if not line.startswith("group:")]  # as a test before has left it
    assert lines[0] == "state:   collecting"
    assert lines[1] == "engine:  SGLang 0.5.23, tp_size 2, cpu"
    assert lines[2] == "serves:  version 'version of for a person'"
    assert lines[3].startswith("update:  'second' (version 'version of second') collecting")
    assert "waits for ranks [0]" in lines[3]
    assert lines[4].startswith("last:    'for a person' (version 'version of for a person') committed")
    waiting.cancel()


def test_capabilities_say_what_can_be_asked_for(pair: Pair) -> None:
    capabilities = pair.rpc.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=5)
    assert list(capabilities.features) == list(pb.Feature.values())[1:]
    assert list(capabilities.dtypes) == list(pb.DataType.values())[1:]
    engine = capabilities.engine
    assert (engine.version, engine.tp_size, engine.device, engine.dialect) == ("0.5.23", 2, "cpu", "0.5.21")
    assert engine.unsupported_reason == ""


def test_metrics_count_updates_by_outcome(start: StartPair) -> None:
    port = free_port()
    pair = start("--http-listen", f"127.0.0.1:{port}")
    pair.update("counted")
    break_an_update(pair)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert 'weightsync_updates_total{outcome="committed"} 1.0' in text
    assert 'weightsync_updates_total{outcome="failed"} 1.0' in text
    assert 'weightsync_updates_total{outcome="aborted"} 0.0' in text
    assert 'weightsync_phase_seconds_count{phase="load"} 2.0' in text
    assert "weightsync_ready 0.0" in text
