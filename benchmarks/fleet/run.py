"""``python -m benchmarks fleet``: the control of a fleet's update, by the number of engines.

The trainer is this process, with a real ``Fleet``; engines and their real sidecars share a few processes beside it, on
the same cores. No bytes are broadcast (``no_network``), so what is measured is the control: look, join at the first
update, begin, prepare, commit, publish. Invariant: a number of engines has processes of its own, ended before the next
number's are started.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import torch

from adapter.errors import WeightSyncError
from adapter.fleet import Fleet, FleetResult
from benchmarks.byte_counter import ByteCounter
from benchmarks.fleet.engine import RELEASE
from benchmarks.fleet.hosts import NOBODY, Hosts, Slow, hosts, names, target
from benchmarks.fleet.no_network import NoNetwork
from benchmarks.fleet.open_files import allow_many
from benchmarks.fleet.table import AGAIN, BENCHMARK, FIRST, SLOW, text
from benchmarks.machine import this_machine
from benchmarks.samples import SAMPLES, Run, Sample, SampleFile

WARM_UPS = 2
FIRSTS = 3
"""Fleets that are opened anew, for what a first update costs."""
TENSORS = 16
SEEN_S = 60.0
POLL_S = 0.1
PATIENCE_S = 120.0
"""For 256 sidecars on few cores."""

Tensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    engines: Sequence[int]
    out: Path
    repeats: int = 9
    slow: Mapping[int, float] = field(default_factory=dict)
    """Rows with a slow engine: among how many, and how many milliseconds each of its loads takes longer."""


def run(options: Options) -> None:
    """Measure, print, and keep samples in ``out/fleet``."""
    folder = options.out / "fleet"
    file = SampleFile(folder)
    file.note("machine", asdict(this_machine(f"scripted {RELEASE}")))
    allow_many()
    for number in options.engines:
        with _served(number, folder / "hosts.log") as (served, sockets):
            _ordinary(served, sockets, options.repeats, file)
    for number, slow_ms in options.slow.items():
        slow = Slow(name=names(number)[number // 2], seconds=slow_ms / 1e3)
        with _served(number, folder / "hosts.log", slow) as (served, _):
            _with_a_slow_one(served, slow, options.repeats, file)
    print(text(Run.read(folder / SAMPLES)), flush=True)


@contextmanager
def _served(number: int, log_path: Path, slow: Slow = NOBODY) -> Iterator[tuple[Hosts, Path]]:
    """Hosts whose sidecars all see their engines, and the folder with their sockets."""
    with (
        tempfile.TemporaryDirectory(prefix="weight-sync-") as name,
        hosts(number, Path(name), log_path, slow) as served,
    ):
        _wait_until_seen(served.targets)
        yield served, Path(name)


def _fleet(targets: Sequence[str]) -> Fleet:
    return Fleet(targets, device="cpu", patience=PATIENCE_S, make_group=NoNetwork)


def _wait_until_seen(targets: Sequence[str]) -> None:
    give_up = time.monotonic() + SEEN_S
    with _fleet(targets) as fleet:
        while waited_for := [name for name, said in fleet.status().items() if not _sees_its_engine(said)]:
            if time.monotonic() > give_up:
                raise RuntimeError(f"{len(waited_for)} sidecars do not see their engines, {waited_for[0]} among them")
            time.sleep(POLL_S)


def _sees_its_engine(said: object) -> bool:
    return not isinstance(said, WeightSyncError) and bool(getattr(said, "weight_version", ""))


def _ordinary(served: Hosts, sockets: Path, repeats: int, file: SampleFile) -> None:
    """Fleets that are new, and one that goes on; then one more, whose bytes are counted."""
    subject = f"{len(served.targets)} engines"
    for _ in range(FIRSTS):
        with _fleet(served.targets) as fleet:
            file.add(_measured(fleet, served, subject, FIRST))
    with _fleet(served.targets) as fleet:
        for repeat in range(1 + WARM_UPS + repeats):
            file.add(_measured(fleet, served, subject, AGAIN, warm_up=repeat <= WARM_UPS))
    file.note("bytes", {"way": subject, **_bytes(served, sockets)})


def _with_a_slow_one(served: Hosts, slow: Slow, repeats: int, file: SampleFile) -> None:
    subject = f"{len(served.targets)} engines, {slow.name} {slow.seconds * 1e3:g} ms slower"
    with _fleet(served.targets) as fleet:
        for repeat in range(1 + WARM_UPS + repeats):
            file.add(_measured(fleet, served, subject, SLOW, warm_up=repeat <= WARM_UPS))


def _measured(fleet: Fleet, served: Hosts, subject: str, way: str, *, warm_up: bool = False) -> Sample:
    """One update, from the call to its return."""
    tensors = _tensors()
    hosts_s, own_s, began = served.cpu_s(), time.process_time(), time.perf_counter()
    result = fleet.update_weights(tensors, version=str(next(_versions)))
    seconds, own_s = time.perf_counter() - began, time.process_time() - own_s
    hosts_s = served.cpu_s() - hosts_s
    counts = {"engines": len(result.engines), "trainer_cpu_us": int(own_s * 1e6), "others_cpu_us": int(hosts_s * 1e6)}
    return Sample(
        benchmark=BENCHMARK,
        subject=subject,
        tp=1,
        way=way,
        seconds=seconds,
        phases=_steps(result, seconds),
        counts=counts,
        slowest=result.slowest,
        warm_up=warm_up,
    )


def _steps(result: FleetResult, seconds: float) -> Mapping[str, float]:
    """What the fleet says, and before it what is left: the look at all members, and the buckets' plan."""
    rest = seconds - sum(result.seconds.values())
    return {"look": rest, **result.seconds}


def _bytes(served: Hosts, sockets: Path) -> dict[str, int]:
    """Of one engine's control, both ways, framing and headers included: for an update like those before."""
    listen = target(sockets, "counted")
    with ByteCounter(served.targets[0], listen) as counter, _fleet([listen]) as fleet:
        for _ in range(WARM_UPS):
            fleet.update_weights(_tensors(), version=str(next(_versions)))
        counter.reset()
        fleet.update_weights(_tensors(), version=str(next(_versions)))
        return {"grpc_request": counter.sent, "grpc_answer": counter.received}


def _tensors() -> Tensors:
    """Few and small: the same plan each time, from other objects, as a trainer's are."""
    return [(f"model.layers.{number}.weight", torch.zeros(4)) for number in range(TENSORS)]


_versions = count(1)
