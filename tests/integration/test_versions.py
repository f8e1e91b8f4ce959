"""Which versions an engine takes, and what its refusal of a bucket means."""

from __future__ import annotations

import os
import subprocess
import sys

import grpc
import pytest
import torch

from adapter import WeightSyncClient
from adapter.planner import TensorSpec
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, Pair, refusal


def send_version(pair: Pair, update_id: str, version: str) -> grpc.Future[pb.UpdateWeightsResponse]:
    request = pair.request(update_id, tp_size=1)
    request.update.weight_version = version
    return pair.send(request)


def test_versions_are_unique_and_increase_where_they_are_numbers(start: StartPair) -> None:
    pair = start(tp_size=1)
    for version in ("9", "10", "eleven", "12"):
        assert send_version(pair, f"first {version}", version).result().outcome.weight_version == version
    pair.mark()
    for version in ("12", "11", "9", "eleven"):
        refused = refusal(send_version(pair, f"second {version}", version))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VERSION_NOT_NEW")
        assert f"rank 0: weight_version '{version}' does not come after '12'" in refused.message
    pair.assert_untouched()


def test_a_first_bucket_that_the_engine_refuses_leaves_it_as_it_was(start: StartPair) -> None:
    pair = start(tp_size=1)
    pair.engine.fault(LOAD, Fault.REFUSE, message="derived weights cannot be updated")
    refused = refusal(send_version(pair, "refused", "1"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_REFUSED")
    assert "derived weights cannot be updated" in refused.message
    assert pair.outcome("refused").state == pb.UPDATE_STATE_ABORTED
    assert (pair.is_paused(), pair.engine.session_open) == (False, False)
    assert pair.status().state == pb.SIDECAR_STATE_READY


def test_two_ranks_that_name_one_file_are_refused(pair: Pair) -> None:
    first, second = (pair.request("one file", rank) for rank in range(2))
    second.handles[0].CopyFrom(first.handles[0])
    waiting = pair.send(first)
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    refused = refusal(pair.send(second))
    name = first.handles[0].shared_memory.name
    assert refused.reason == "INVALID_HANDLE"
    assert f"ranks 0 and 1 both send from shared memory {name}" in refused.message
    waiting.cancel()


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 64])
def test_a_tensor_after_the_last_of_specs_is_an_error_and_not_lost(start: StartPair, bucket_bytes: int) -> None:
    pair = start(tp_size=1)
    named = [("a", torch.zeros(16)), ("b", torch.zeros(16)), ("c", torch.zeros(16))]
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named[:2]]
    with WeightSyncClient(pair.target, rank=0, tp_size=1, bucket_bytes=bucket_bytes) as client:
        with pytest.raises(ValueError, match="yields c after the last of specs"):
            client.update_weights(iter(named), specs=specs, version="1", timeout=10)
        assert client.unreleased_bytes == 0
    assert pair.engine.weight_version == "default"


@pytest.mark.parametrize("layout", [{"quantization": "fp8"}, {"pp_size": 2}, {"dp_size": 2}])
def test_a_server_that_an_update_could_kill_is_refused_by_name(start: StartPair, layout: dict[str, object]) -> None:
    pair = start(tp_size=1, server_info=layout)
    refused = refusal(send_version(pair, "refused", "1"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_UNSUPPORTED")
    assert pair.posts() == []


def test_a_proxy_in_the_environment_sees_no_local_call(start: StartPair) -> None:
    pair = start(tp_size=1)
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    command = [sys.executable, "-m", "sidecar", "health", "--target", pair.target]
    done = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
