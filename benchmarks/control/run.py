"""``python -m benchmarks control``: what gRPC and the sidecar add, by ranks and by tensors.

By ranks, three things in turn, in the same processes: an update through the sidecar; the same POSTs by rank 0 alone,
with every rank's handle at hand; ``gather_object`` of each rank's payload. What is added is the first without the
second, from the moment at which all ranks start to the last one's answer; what ``gather_object`` adds ends when rank 0
could POST. By tensors: an update by digest, from its start to its last answer, without the sidecar's phases that are
the engine's. Invariant: the engine is the scripted one, in its own process: only what is compared runs besides.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path

from adapter.launch import SidecarConfig, SidecarProcess
from benchmarks import report
from benchmarks.byte_counter import ByteCounter
from benchmarks.control.engine import RELEASE, scripted_engine
from benchmarks.control.ranks import ControlRanks, control_ranks
from benchmarks.machine import this_machine
from benchmarks.samples import Sample, SampleFile

WARM_UPS = 3
FEW_TENSORS = 16
RANKS_BY_TENSORS = 2
ENGINE_PHASES = ("pause", "begin", "load", "end", "flush", "publish", "resume")


def run(numbers_of_ranks: Sequence[int], numbers_of_tensors: Sequence[int], out: Path, repeats: int) -> None:
    """Measure, print, and keep samples in ``out/control``."""
    file = SampleFile(out / "control")
    file.note("machine", asdict(this_machine(f"scripted {RELEASE}")))
    for num_ranks in numbers_of_ranks:
        with _everything(num_ranks) as (ranks, url, target, _):
            _by_ranks(ranks, url, target, repeats, file)
    with _everything(RANKS_BY_TENSORS) as (ranks, _, target, folder):
        for num_tensors in numbers_of_tensors:
            _by_tensors(ranks, target, folder, num_tensors, repeats, file)
    print(report.text(out / "control"))


@contextmanager
def _everything(num_ranks: int) -> Iterator[tuple[ControlRanks, str, str, Path]]:
    """Ranks, the engine's address, the sidecar's, and a folder for sockets."""
    with tempfile.TemporaryDirectory(prefix="weight-sync-") as name, scripted_engine(num_ranks) as url:
        folder = Path(name)
        target = f"unix:{folder}/sidecar.sock"
        sidecar = SidecarConfig(engine_url=url, listen=target, log_path=folder / "sidecar.log")
        with SidecarProcess(sidecar), control_ranks(num_ranks, folder) as ranks:
            yield ranks, url, target, folder


def _by_ranks(ranks: ControlRanks, url: str, target: str, repeats: int, file: SampleFile) -> None:
    ranks.do("open", target=target, num_tensors=FEW_TENSORS, prefix="model")
    for repeat in range(WARM_UPS + repeats):
        version, warm_up = str(repeat + 1), repeat < WARM_UPS
        at, answers = ranks.at_once("ours", version=version)
        ours = max(answer["end"] for answer in answers) - at
        handles = [answer["handle"] for answer in ranks.do("lend")]
        at, direct = ranks.first_does("direct", url=url, handles=handles, version=version)
        added = ours - (direct["end"] - at)
        subject = f"{len(ranks)} ranks"
        export = ours - sum(answers[0]["phases"].values())
        file.add(_sample(subject, "sidecar", ours, {"export": export, **answers[0]["phases"]}, warm_up=warm_up))
        file.add(_sample(subject, "direct", direct["end"] - at, direct["phases"], warm_up=warm_up))
        file.add(_sample(subject, "sidecar_adds", added, warm_up=warm_up))
        at, gathered = ranks.at_once("gather")
        counts = {"gather": sum(answer["bytes"] for answer in gathered)}
        file.add(_sample(subject, "gather_object", gathered[0]["end"] - at, counts=counts, warm_up=warm_up))


def _by_tensors(
    ranks: ControlRanks, target: str, folder: Path, num_tensors: int, repeats: int, file: SampleFile
) -> None:
    counted = f"unix:{folder}/of{num_tensors}.sock"  # an address of its own: gRPC waits before it tries one again
    with ByteCounter(target, counted) as counter:
        ranks.do("open", target=counted, num_tensors=num_tensors, prefix=f"of{num_tensors}")
        for repeat in range(WARM_UPS + repeats):
            counter.reset()
            at, answers = ranks.at_once("ours", version=str(next(_versions)))
            phases = answers[0]["phases"]
            seconds = max(answer["end"] for answer in answers) - at - sum(phases.get(name, 0) for name in ENGINE_PHASES)
            counts = {"grpc_request": counter.sent // len(ranks)}
            name = "first" if repeat == 0 else "by_digest"
            warm_up = 0 < repeat < WARM_UPS
            file.add(_sample(f"{num_tensors} tensors", name, seconds, counts=counts, warm_up=warm_up))
        ranks.do("close")


_versions = count(1)
"""Of the engine that is asked for one number of tensors after the other."""


def _sample(
    subject: str,
    way: str,
    seconds: float,
    phases: Mapping[str, float] | None = None,
    counts: Mapping[str, int] | None = None,
    *,
    warm_up: bool,
) -> Sample:
    return Sample(
        benchmark="control",
        subject=subject,
        tp=0,
        way=way,
        seconds=seconds,
        phases=phases or {},
        counts=counts or {},
        warm_up=warm_up,
    )
