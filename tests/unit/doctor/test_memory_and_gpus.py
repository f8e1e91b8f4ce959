"""Faults planted in how memory is allocated and on which GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.doctor import gpus, memory
from sidecar.doctor.finding import Check, Verdict
from tests.unit.doctor.hosts import ENGINE, GPUS, OTHER_PIDS, Planted, assert_found, only

EXPANDABLE = "max_split_size_mb:512, expandable_segments:True"
TRACES = 1 << 19


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path / "host")


@pytest.mark.parametrize("variable", memory.VARIABLES)
def test_expandable_segments_that_the_engine_may_not_trace_are_found(planted: Planted, variable: str) -> None:
    planted.environ[variable] = EXPANDABLE
    planted.ptrace_scope(1)
    found = only(memory.allocator(planted.situation()), Check.ALLOCATOR)
    assert_found(found, Verdict.WARN, "kernel.yama.ptrace_scope is 1", "expandable_segments:False")


def test_expandable_segments_in_another_pid_namespace_are_found(planted: Planted) -> None:
    planted.environ["PYTORCH_ALLOC_CONF"] = EXPANDABLE
    planted.pid_namespace(ENGINE, OTHER_PIDS)
    found = only(memory.allocator(planted.situation()), Check.ALLOCATOR)
    assert_found(found, Verdict.WARN, "it is in another PID namespace", "expandable_segments:False")


@pytest.mark.parametrize(("scope", "verdict"), [(1, Verdict.OK), (2, Verdict.OK), (3, Verdict.WARN)])
def test_an_engine_with_the_right_to_trace_opens_them_up_to_scope_2(
    planted: Planted, scope: int, verdict: Verdict
) -> None:
    planted.environ["PYTORCH_CUDA_ALLOC_CONF"] = EXPANDABLE
    planted.ptrace_scope(scope)
    planted.status(ENGINE, capabilities=TRACES)
    assert only(memory.allocator(planted.situation()), Check.ALLOCATOR).verdict is verdict


def test_where_nothing_is_in_the_way_expandable_segments_are_only_named(planted: Planted) -> None:
    planted.environ["PYTORCH_CUDA_ALLOC_CONF"] = EXPANDABLE
    found = only(memory.allocator(planted.situation()), Check.ALLOCATOR)
    assert_found(found, Verdict.OK, "allow_expandable_segments=True", "")


def test_an_allocator_without_exports_is_found_on_either_side(planted: Planted) -> None:
    planted.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
    planted.started_with(ENGINE, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    ours = only(memory.allocator(planted.situation()), Check.ALLOCATOR)
    assert_found(ours, Verdict.FAIL, "cudaMallocAsync", "leave backend out")
    theirs = only(memory.engine_allocator(planted.situation()), Check.ENGINE_ALLOCATOR)
    assert_found(theirs, Verdict.FAIL, "cudaMallocAsync in the engine", "leave backend out")


def test_an_engine_whose_environment_is_not_seen_is_not_judged(planted: Planted) -> None:
    (planted.root / "proc" / ENGINE / "environ").write_text("sglang::server\0\0\0")
    assert only(memory.engine_allocator(planted.situation()), Check.ENGINE_ALLOCATOR).verdict is Verdict.SKIPPED


def test_the_engines_gpus_are_seen(planted: Planted) -> None:
    found = only(gpus.visible(planted.situation()), Check.GPUS)
    assert_found(found, Verdict.OK, "sees the GPUs of 2 of the engine's 2 ranks", "")


@pytest.mark.parametrize(
    ("choice", "verdict", "reason"),
    [
        ("", Verdict.FAIL, f"rank 0 on GPU-{GPUS[0]}, rank 1 on GPU-{GPUS[1]}"),
        ("0", Verdict.WARN, f"does not see the GPUs of rank 1 on GPU-{GPUS[1]}"),
    ],
)
def test_gpus_that_this_process_does_not_see_are_found(
    planted: Planted, choice: str, verdict: Verdict, reason: str
) -> None:
    planted.environ["CUDA_VISIBLE_DEVICES"] = choice
    assert_found(only(gpus.visible(planted.situation()), Check.GPUS), verdict, reason, "CUDA_VISIBLE_DEVICES")


def test_a_gpu_of_the_engines_that_this_container_lacks_is_found(planted: Planted) -> None:
    (planted.root / "dev/nvidia0").unlink()
    view = planted.another_view("dev", "proc/driver/nvidia")
    (view / "proc/driver/nvidia/gpus").symlink_to(planted.root / "proc/driver/nvidia/gpus")
    for minor in range(2):
        (view / f"dev/nvidia{minor}").touch()
    found = only(gpus.visible(planted.situation()), Check.GPUS)
    assert_found(found, Verdict.WARN, f"rank 0 on GPU-{GPUS[0]}", "docker run --gpus")


def test_a_named_gpu_that_is_on_no_such_host_is_found(planted: Planted) -> None:
    named = (GPUS[0], GPUS[1].replace("b", "c"))
    found = only(gpus.visible(planted.situation(gpu_uuids=named)), Check.GPUS)
    assert_found(found, Verdict.FAIL, f"GPU-{named[1]} is not one of this host's", "nvidia-smi -L")


def test_another_number_of_gpus_than_ranks_is_found(planted: Planted) -> None:
    found = only(gpus.visible(planted.situation(gpu_uuids=GPUS[:1])), Check.GPUS)
    assert_found(
        found, Verdict.FAIL, "--gpu-uuids names 1 GPUs, but the engine has tp_size 2", "name one for each TP rank"
    )


def test_gpus_that_are_not_known_are_asked_for(planted: Planted) -> None:
    found = only(gpus.visible(planted.situation(seen=False)), Check.GPUS)
    assert_found(found, Verdict.WARN, "is not seen", "--gpu-uuids")
