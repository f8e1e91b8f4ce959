"""A sidecar process beside a scripted engine, and requests for it as a trainer in any language would write them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from adapter.launch import SidecarConfig, SidecarProcess
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.fakes import ScriptedEngine, SharedFile

LOAD = "/update_weights_from_tensor"
BUCKET_BYTES = 128
ANSWER_S = 20.0
SESSIONS = "0.5.23"
NO_SESSIONS = "0.5.20"


def expected_posts(release: str, num_buckets: int) -> list[str]:
    """Everything that changes state in one good update, in order."""
    before, after = (["/begin_weight_update"], ["/end_weight_update"]) if release == SESSIONS else ([], [])
    load = [LOAD] * num_buckets
    end = ["/flush_cache", "/update_weight_version", "/continue_generation"]
    return ["/pause_generation", *before, *load, *after, *end]


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call failed."""

    code: grpc.StatusCode
    reason: str
    message: str
    details: dict[str, str]


class Pair:
    """One engine, one sidecar, one channel to it."""

    def __init__(
        self, engine: ScriptedEngine, folder: Path, args: Sequence[str] = (), listen: str = "", *, manager: bool = True
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.target = listen or f"unix:{folder}/sidecar.sock"
        log = folder / "sidecar.log"
        config = SidecarConfig(
            engine_url=engine.url, listen=self.target, log_path=log, args=tuple(args), grace_s=0.0
        )  # what an orderly end does is proven in test_process
        self.process = SidecarProcess(config)
        self.channel = grpc.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)])
        self.rpc = pb_grpc.WeightSyncServiceStub(self.channel)
        self._mark = 0
        self._manager = socket.socket(socket.AF_UNIX)
        if manager:  # a second pair in the same folder finds the first one's
            self._manager.bind(str(folder / "manager.sock"))
        self._files: list[SharedFile] = []

    def close(self) -> None:
        self.forget_memory()
        self._manager.close()
        self.channel.close()
        self.process.stop()
        assert "a defect in the sidecar" not in self.process.process.log_text()

    def status(self) -> pb.GetStatusResponse:
        return self.rpc.GetStatus(pb.GetStatusRequest(), timeout=ANSWER_S)

    def outcome(self, update_id: str) -> pb.UpdateOutcome:
        return self.rpc.GetUpdate(pb.GetUpdateRequest(update_id=update_id), timeout=ANSWER_S).outcome

    def mark(self) -> None:
        """Count POSTs from here."""
        self._mark = len(self.engine.calls)

    def posts(self) -> list[str]:
        """Every state-changing call to the engine since the mark."""
        return [call.path for call in self.engine.calls[self._mark :] if call.method == "POST"]

    def bodies(self, path: str) -> list[Any]:
        """Bodies of the POSTs to ``path`` since the mark."""
        return [call.body for call in self.engine.calls[self._mark :] if call.path == path]

    def assert_untouched(self) -> None:
        """The engine received nothing, and the sidecar is ready for the next update."""
        assert self.posts() == []
        status = self.status()
        assert status.state == pb.SIDECAR_STATE_READY
        assert not status.HasField("current_update")

    def is_paused(self) -> bool:
        """Whether the engine holds generation now."""
        return self.engine.paused

    def wait_for(self, *states: pb.SidecarState.ValueType) -> pb.GetStatusResponse:
        wait_until(lambda: self.status().state in states)
        return self.status()

    # Memory, as the engine's own shared-memory reader sees it.

    def handle(self, content: bytes = bytes(BUCKET_BYTES), *, on_another_host: bool = False) -> pb.MemoryHandle:
        """One piece of named shared memory, for one importer."""
        file = SharedFile(content, on_another_host=on_another_host)
        self._files.append(file)
        manager = "/another/host/manager.sock" if on_another_host else str(self.folder / "manager.sock")
        shared = pb.SharedMemoryHandle(manager_path=manager, name=file.name, size_bytes=file.size_bytes)
        return pb.MemoryHandle(shared_memory=shared)

    def counts(self) -> list[int]:
        """Holders of every piece so far: 1 is the trainer alone."""
        return [file.count for file in self._files]

    def forget_memory(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()

    # Calls.

    def request(
        self, update_id: str, rank: int = 0, *, tp_size: int = 2, num_buckets: int = 1
    ) -> pb.UpdateWeightsRequest:
        """One rank's whole update, correct in every way."""
        return pb.UpdateWeightsRequest(
            update=header(update_id, rank, tp_size),
            manifest=pb.ManifestReference(manifest=manifest(num_buckets)),
            handles=[self.handle(bytes([rank + bucket]) * BUCKET_BYTES) for bucket in range(num_buckets)],
        )

    def send(
        self, request: pb.UpdateWeightsRequest, timeout_s: float = ANSWER_S
    ) -> grpc.Future[pb.UpdateWeightsResponse]:
        return self.rpc.UpdateWeights.future(request, timeout=timeout_s)

    def update(self, update_id: str, tp_size: int = 2, num_buckets: int = 1) -> pb.UpdateOutcome:
        """A whole good update from all ranks."""
        requests = [self.request(update_id, r, tp_size=tp_size, num_buckets=num_buckets) for r in range(tp_size)]
        answers = [self.send(request) for request in requests]
        outcomes = [answer.result(ANSWER_S).outcome for answer in answers]
        assert all(outcome == outcomes[0] for outcome in outcomes)
        return outcomes[0]

    def begin(self, update_id: str, tp_size: int = 2, num_buckets: int = 2) -> None:
        """All ranks open their part of a bucketed update."""
        for rank in range(tp_size):
            reference = pb.ManifestReference(manifest=manifest(num_buckets))
            request = pb.BeginUpdateRequest(update=header(update_id, rank, tp_size), manifest=reference)
            self.rpc.BeginUpdate(request, timeout=ANSWER_S)

    def push(
        self, update_id: str, rank: int, bucket: int, timeout_s: float = ANSWER_S
    ) -> grpc.Future[pb.PushBucketResponse]:
        request = pb.PushBucketRequest(update_id=update_id, rank=rank, bucket=bucket, handle=self.handle())
        return self.rpc.PushBucket.future(request, timeout=timeout_s)

    def commit(self, update_id: str, rank: int, timeout_s: float = ANSWER_S) -> grpc.Future[pb.CommitUpdateResponse]:
        return self.rpc.CommitUpdate.future(pb.CommitUpdateRequest(update_id=update_id, rank=rank), timeout=timeout_s)


def header(update_id: str, rank: int, tp_size: int = 2) -> pb.UpdateHeader:
    return pb.UpdateHeader(update_id=update_id, weight_version=f"version of {update_id}", rank=rank, tp_size=tp_size)


def manifest(num_buckets: int = 1) -> pb.Manifest:
    return pb.Manifest(buckets=[_bucket(number) for number in range(num_buckets)])


def _bucket(number: int) -> pb.BucketSpec:
    weight = pb.TensorSpec(
        name=f"layer.{number}.weight", dtype=pb.DATA_TYPE_FLOAT32, shape=[2, 3], byte_offset=0, size_bytes=24
    )
    bias = pb.TensorSpec(
        name=f"layer.{number}.bias", dtype=pb.DATA_TYPE_BFLOAT16, shape=[4], byte_offset=64, size_bytes=8
    )
    return pb.BucketSpec(size_bytes=BUCKET_BYTES, tensors=[weight, bias])


def refusal(answer: grpc.Future[Any]) -> Refusal:
    """How a call that must fail failed; every refusal has exactly one ErrorInfo."""
    error = failed_call(answer)
    status = rpc_status.from_call(error)
    assert status is not None, (error.code(), error.details())
    (detail,) = status.details
    info = ErrorInfo()
    assert detail.Unpack(info)
    assert info.domain == "sglang-weight-sync"
    return Refusal(error.code(), info.reason, error.details() or "", dict(info.metadata))


def failed_update(pair: Pair, update_id: str, num_buckets: int = 1) -> Refusal:
    """Both ranks send; both are told the same."""
    answers = [pair.send(pair.request(update_id, rank, num_buckets=num_buckets)) for rank in range(2)]
    first, second = (refusal(answer) for answer in answers)
    assert first == second
    return first


def failed_call(answer: grpc.Future[Any]) -> grpc.Call:
    """The error of a call that must fail."""
    error = answer.exception(ANSWER_S)
    assert isinstance(error, grpc.RpcError), "the call was answered"
    return cast("grpc.Call", error)  # every error of a call is one


def wait_until(happened: Callable[[], bool], timeout_s: float = ANSWER_S) -> None:
    give_up = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.01)
