"""What the demo does, step by step, and what it holds true of each step.

Owns the order of the steps and the checks. Invariant: the story ends well only if every check held; the server, the
sidecar and the trainers are gone when it ends, however it ends.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapter.demo import tiny_model
from adapter.demo.cpu_engine import cpu_engine, cuda_engine
from adapter.demo.engine_http import EngineHttp, RankChecksums
from adapter.demo.report import Report
from adapter.demo.trainers import RankReport, TrainerRank, trainer_ranks, update_all
from adapter.errors import WeightSyncError
from adapter.launch import EngineConfig, EngineProcess, SidecarConfig, SidecarProcess

UPDATE_PATH = "/update_weights_from_tensor"
_PROMPT = (11, 42, 7)
_NUM_TOKENS = 12
# The first answer on a GPU waits for kernels to be compiled.
_ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Step:
    """One weight version to send."""

    label: str
    seed: int


STEPS = (Step("v1", 1), Step("v2", 2), Step("v1-again", 1))


@dataclass(frozen=True, slots=True)
class Shown:
    """What the server showed with one version of the weights."""

    tokens: list[int]
    checksums: RankChecksums


@dataclass(slots=True)
class Stage:
    """Everything that runs while the story is told."""

    engine: EngineProcess
    http: EngineHttp
    ranks: Sequence[TrainerRank]
    report: Report
    seen: dict[str, Shown] = field(default_factory=dict)


def tell(workdir: Path, report: Report) -> None:
    """Starts everything, sends the versions, checks each; raises nothing for a check that failed: `report` knows."""
    tp_size, devices = _choose_devices()
    report.title(f"SGLang with tp {tp_size} on {devices[0].partition(':')[0]}, {tp_size} trainer processes")
    with _open_stage(workdir, tp_size, devices, report) as stage:
        stage.report.tokens("before", stage.http.generate(_PROMPT, _NUM_TOKENS))
        for step in STEPS:
            _send(stage, step)
        _check_versions(stage)
        _compare_with_disk(stage, workdir)


def _choose_devices() -> tuple[int, list[str]]:
    """The server's TP size and each trainer rank's device: rank r lives on the GPU of the server's TP rank r."""
    if not torch.cuda.is_available():
        return 2, ["cpu", "cpu"]
    tp_size = min(2, torch.cuda.device_count())
    return tp_size, [f"cuda:{index}" for index in range(tp_size)]


@contextlib.contextmanager
def _open_stage(workdir: Path, tp_size: int, devices: Sequence[str], report: Report) -> Iterator[Stage]:
    model = tiny_model.write_config(workdir / "model")
    make_engine = cpu_engine if devices[0] == "cpu" else cuda_engine
    listen = f"unix:{workdir / 'sidecar.sock'}"
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_start_engine(make_engine(workdir, model, tp_size=tp_size), report))
        config = SidecarConfig(engine_url=engine.url, listen=listen, log_path=workdir / "sidecar.log")
        with report.timed("the sidecar"):
            stack.enter_context(SidecarProcess(config))
        with report.timed("the trainer processes"):
            ranks = stack.enter_context(trainer_ranks(listen, devices, workdir))
        yield Stage(engine, EngineHttp(engine.url, _ANSWER_TIMEOUT_S), ranks, report)
        report.line("ending all processes")


def _start_engine(config: EngineConfig, report: Report) -> EngineProcess:
    with report.timed("the SGLang server"):
        return EngineProcess(config)


def _send(stage: Stage, step: Step) -> None:
    greetings = 0 if stage.seen else 1  # the first update asks the engine's replay loaders whether they answer
    posts_before = stage.engine.count_requests("POST", UPDATE_PATH)
    started = time.monotonic()
    reports = update_all(stage.ranks, step.seed, step.label)
    seconds = time.monotonic() - started
    _raise_if_failed(reports)
    posts = stage.engine.count_requests("POST", UPDATE_PATH) - posts_before - greetings
    tokens = stage.http.generate(_PROMPT, _NUM_TOKENS)
    stage.seen[step.label] = Shown(tokens, stage.http.rank_checksums())
    stage.report.update(step.label, tokens, reports[0], posts, seconds)
    stage.report.check(f"{step.label}: one POST {UPDATE_PATH} for {len(reports)} ranks", posts == 1)
    stage.report.check(f"{step.label}: the server names this version", stage.http.weight_version() == step.label)


def _raise_if_failed(reports: Sequence[RankReport]) -> None:
    for rank, report in enumerate(reports):
        if report.error:
            raise WeightSyncError(f"rank {rank}: {report.kind}: {report.error}")


def _check_versions(stage: Stage) -> None:
    first, second, again = (stage.seen[step.label] for step in STEPS)
    stage.report.check("v2 gives other tokens than v1", second.tokens != first.tokens)
    stage.report.check("v1 again gives v1's tokens", again.tokens == first.tokens)
    stage.report.check("v2 gives other checksums than v1", second.checksums != first.checksums)
    stage.report.check("v1 again gives v1's checksums", again.checksums == first.checksums)


def _compare_with_disk(stage: Stage, workdir: Path) -> None:
    """The same weights through safetensors files and SGLang's own loading; v2 first, so that each load is a change."""
    for step in (STEPS[1], STEPS[0]):
        checkpoint = tiny_model.save_checkpoint(workdir / f"disk-{step.label}", tiny_model.random_weights(step.seed))
        stage.http.load_from_disk(checkpoint)
        from_disk, sent = stage.http.rank_checksums(), stage.seen[step.label].checksums
        for rank, (ours, theirs) in enumerate(zip(sent, from_disk, strict=True)):
            label = f"{step.label}, TP rank {rank}: {len(ours)} tensors have the checksums of a load from disk"
            stage.report.check(label, ours == theirs)
