"""``python -m benchmarks broadcast``: weights over torch.distributed to one real server, against a bare broadcast.

The trainer is this process, on GPU 0; the server has the GPUs after it, so NCCL carries the bytes. On the CPU gloo
does. A bare broadcast of the same buckets goes to a process of its own on the server's first GPU. Invariants: both are
measured in one run, in turn, over groups that are joined and warm; and neither has anything on a GPU while the other is
measured. A kernel that waits for its sender would take half of the GPU's time: two processes share one in slices.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adapter.fleet import Fleet
from adapter.launch import EngineProcess, SidecarConfig, SidecarProcess
from adapter.planner import Plan, TensorSpec, plan
from adapter.process_group import BroadcastGroup, join_group, wait_all
from benchmarks.machine import this_machine
from benchmarks.samples import Sample, SampleFile, Spread
from benchmarks.shapes import MODELS, NamedTensors, random_weights
from benchmarks.sync.engine import EngineFacts, engine_config

START_S = 120.0
BARE, UPDATE = "bare_broadcast", "fleet_update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    model: str
    tp_size: int
    device: str
    bucket_bytes: tuple[int, ...]
    out: Path
    repeats: int = 7
    warm_ups: int = 2


def run(options: Options) -> None:
    """Start everything, measure everything, print the table, end everything."""
    file = SampleFile(options.out)
    shape = MODELS[options.model]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weight-sync-")))
        config = engine_config(
            shape,
            device=options.device,
            tp_size=options.tp_size,
            folder=folder,
            log_path=options.out / "engine.log",
        )
        if options.device == "cuda":
            gpus = ",".join(str(1 + rank) for rank in range(options.tp_size))
            config = replace(config, env={**config.env, "CUDA_VISIBLE_DEVICES": gpus}, replay=False)
        facts = EngineFacts.of(stack.enter_context(EngineProcess(config)).url)
        file.note("machine", asdict(this_machine(facts.version, config.args)))
        target = f"unix:{folder}/sidecar.sock"
        log_path = options.out / "sidecar.log"
        stack.enter_context(SidecarProcess(SidecarConfig(engine_url=facts.url, listen=target, log_path=log_path)))
        device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
        weights = [random_weights(shape, seed, device) for seed in (1, 2)]
        for size in options.bucket_bytes:
            _measure(options, file, target, weights, device, size)


def _measure(
    options: Options,
    file: SampleFile,
    target: str,
    weights: list[NamedTensors],
    device: torch.device,
    bucket_bytes: int,
) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights[0]]
    cut = plan(specs, bucket_bytes, dense=True)
    total = sum(bucket.num_bytes for bucket in cut.buckets)
    number = options.warm_ups + options.repeats
    with (
        _receiver(options.device, cut) as receiver,
        Fleet([target], bucket_bytes=bucket_bytes, device=device) as f,
    ):
        regions = [torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device) for bucket in cut.buckets]
        for repeat in range(number):
            bare_s = receiver.seconds(regions)
            _synchronise(device)
            began = time.perf_counter()
            result = f.update_weights(weights[repeat % 2], version=f"{bucket_bytes}-{repeat}")
            _synchronise(device)
            seconds = time.perf_counter() - began
            common: dict[str, Any] = {
                "benchmark": "broadcast",
                "subject": f"{options.model} {bucket_bytes}",
                "tp": options.tp_size,
            }
            warm_up = repeat < options.warm_ups
            counts = {"bytes": total, "buckets": len(cut.buckets)}
            file.add(Sample(**common, way=BARE, seconds=bare_s, counts=counts, warm_up=warm_up))
            engine = result.engines[target].update
            assert engine is not None, "the one engine has published it"
            phases = {**result.seconds, **{f"engine {name}": value for name, value in engine.phases.items()}}
            file.add(Sample(**common, way=UPDATE, seconds=seconds, phases=phases, counts=counts, warm_up=warm_up))
    print(table(options.out), flush=True)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Receiver:
    """A process that receives every bucket when it is told to, and does nothing with it."""

    def __init__(self, group: BroadcastGroup, process: subprocess.Popen[str]) -> None:
        self._group = group
        self._process = process

    def seconds(self, regions: list[torch.Tensor]) -> float:
        """What sending these takes, from when both sides are awake."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        if not self._process.stdout.readline():
            raise RuntimeError("the receiver of the bare broadcast has ended")
        began = time.perf_counter()
        wait_all([self._group.broadcast(region) for region in regions], time.monotonic() + START_S)
        _synchronise(regions[0].device)
        return time.perf_counter() - began


@contextmanager
def _receiver(device: str, cut: Plan) -> Iterator[Receiver]:
    group = BroadcastGroup("bare", 2, "nccl" if device == "cuda" else "gloo", START_S, START_S)
    sizes = ",".join(str(bucket.num_bytes) for bucket in cut.buckets)
    command = [sys.executable, "-m", "benchmarks.broadcast", device, str(group.port), sizes]
    env = (
        {**os.environ, "CUDA_VISIBLE_DEVICES": "1", "NCCL_CUMEM_ENABLE": "0"} if device == "cuda" else dict(os.environ)
    )
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            group.join()
            yield Receiver(group, process)
        finally:
            process.kill()
            group.close()


def receive(device: str, port: int, sizes: list[int]) -> None:
    """The receiver's process: for each line that comes, say that the receiving begins, and do it."""
    store = dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=START_S))  # type: ignore[attr-defined]
    group = join_group(store, "bare", 1, 2, "nccl" if device == "cuda" else "gloo", timedelta(seconds=START_S))
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    regions = [torch.empty(size, dtype=torch.uint8, device=where) for size in sizes]
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    for _ in sys.stdin:
        print(flush=True)
        for region in regions:
            group.broadcast([region], options).wait()
        _synchronise(where)


def table(folder: Path) -> str:
    """Medians of both ways for each size of bucket, and their ratio."""
    from benchmarks.samples import runs

    lines = ["| model, bucket | way | median | low..high | GB/s | share of bare |", "|---|---|---|---|---|---|"]
    for one in runs(folder):
        subjects = dict.fromkeys(sample.subject for sample in one.samples)
        for subject in subjects:
            bare = Spread.of([s.seconds for s in one.of(BARE, subject, "broadcast")])
            for way in (BARE, UPDATE):
                samples = one.of(way, subject, "broadcast")
                spread = Spread.of([sample.seconds for sample in samples])
                rate = samples[0].counts["bytes"] / spread.median / 1e9
                ms = f"{spread.median * 1e3:.1f} ms | {spread.low * 1e3:.1f}..{spread.high * 1e3:.1f}"
                lines.append(f"| {subject} | {way} | {ms} | {rate:.2f} | {bare.median / spread.median:.2f} |")
            steps = sorted({name for sample in one.of(UPDATE, subject, "broadcast") for name in sample.phases})
            for step in steps:
                values = [s.phases[step] for s in one.of(UPDATE, subject, "broadcast") if step in s.phases]
                lines.append(f"| {subject} | - {step} | {Spread.of(values).median * 1e3:.1f} ms | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    receive(sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3].split(",")])
