"""``python -m benchmarks manifest``: the first update of a large manifest, by raw gRPC, on the scripted engine.

What is measured is what the sidecar takes to parse, check, digest and compose it, and the collection of all ranks: the
call's time without the phases that are the engine's. Requests are built before the clock starts; what the client takes
for that, planning and building, is told beside it. Invariant: every repeat is a manifest that the sidecar has not seen.
"""

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import grpc
import torch

from adapter import allocate_flat, wire
from adapter.exports import Export, export_of
from adapter.launch import SidecarConfig, SidecarProcess
from adapter.planner import Plan, plan
from adapter.sidecar_stub import NO_PROXY
from benchmarks import report
from benchmarks.control.engine import RELEASE, scripted_engine
from benchmarks.control.rank import specs
from benchmarks.control.run import ENGINE_PHASES
from benchmarks.machine import this_machine
from benchmarks.samples import Sample, SampleFile
from benchmarks.sync.ways import WHOLE
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

NUMBERS_OF_RANKS = (1, 2)
CALL_S = 120.0
READY_S = 30.0


def run(num_tensors: int, out: Path, repeats: int) -> None:
    """Measure, print, and keep samples in ``out/manifest``."""
    file = SampleFile(out / "manifest")
    file.note("machine", asdict(this_machine(f"scripted {RELEASE}")))
    for num_ranks in NUMBERS_OF_RANKS:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weight-sync-")))
            url = stack.enter_context(scripted_engine(num_ranks))
            target = f"unix:{folder}/sidecar.sock"
            sidecar = SidecarConfig(engine_url=url, listen=target, log_path=folder / "sidecar.log")
            stack.enter_context(SidecarProcess(sidecar))
            channels = [stack.enter_context(_channel(target)) for _ in range(num_ranks)]
            _measure(channels, num_tensors, repeats, file)
    print(report.text(out / "manifest"))


def _channel(target: str) -> grpc.Channel:
    channel = grpc.insecure_channel(target, options=[*NO_PROXY, ("grpc.use_local_subchannel_pool", 1)])
    rpc = pb_grpc.WeightSyncServiceStub(channel)
    give_up = time.monotonic() + READY_S
    while not rpc.GetStatus(pb.GetStatusRequest(), timeout=READY_S).HasField("engine"):
        if time.monotonic() > give_up:
            raise RuntimeError("the sidecar does not see the scripted engine")
        time.sleep(0.05)
    return channel


def _measure(channels: Sequence[grpc.Channel], num_tensors: int, repeats: int, file: SampleFile) -> None:
    subject = f"{num_tensors} tensors, {len(channels)} ranks"
    for repeat in range(1 + repeats):
        started = time.monotonic()
        planned = plan(specs(num_tensors, f"model{repeat}"), WHOLE)
        manifest = wire.manifest(planned)
        built = time.monotonic() - started
        seconds, size = _update(channels, planned, manifest, str(repeat + 1))
        for way, taken, counts in (("client_builds", built, {}), ("collect_and_compose", seconds, {"manifest": size})):
            file.add(
                Sample(
                    benchmark="manifest",
                    subject=subject,
                    tp=len(channels),
                    way=way,
                    seconds=taken,
                    counts=counts,
                    warm_up=repeat == 0,
                )
            )


def _update(channels: Sequence[grpc.Channel], planned: Plan, manifest: pb.Manifest, version: str) -> tuple[float, int]:
    """Seconds that are not the engine's, and the bytes of a manifest."""
    exports = [export_of(allocate_flat(planned.buckets[0].num_bytes, torch.device("cpu"))) for _ in channels]
    requests = [_request(manifest, export, rank, len(channels), version) for rank, export in enumerate(exports)]
    with ThreadPoolExecutor(len(channels)) as pool:
        started = time.monotonic()
        answers = list(pool.map(_call, channels, requests))
        seconds = time.monotonic() - started
    phases = wire.result(answers[0].outcome).phases
    return seconds - sum(phases.get(name, 0.0) for name in ENGINE_PHASES), manifest.ByteSize()


def _call(channel: grpc.Channel, request: pb.UpdateWeightsRequest) -> pb.UpdateWeightsResponse:
    return pb_grpc.WeightSyncServiceStub(channel).UpdateWeights(request, timeout=CALL_S)


def _request(manifest: pb.Manifest, export: Export, rank: int, num_ranks: int, version: str) -> pb.UpdateWeightsRequest:
    header = pb.UpdateHeader(
        update_id=version,
        weight_version=version,
        rank=rank,
        tp_size=num_ranks,
        pause_mode=pb.PAUSE_MODE_RETRACT,
    )
    return pb.UpdateWeightsRequest(
        update=header, manifest=pb.ManifestReference(manifest=manifest), handles=[export.handle()]
    )
