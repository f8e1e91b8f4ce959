"""What a server that a trainer starts inherits, and which GPUs it sees."""

import os
from pathlib import Path

import pytest

from adapter.verl_engine.hosts import clean_environment, gpu_environment, host_identity, trainer_gpu

TORCHRUN = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "h",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip


def test_nothing_of_torchruns_reaches_the_server_and_all_else_does() -> None:
    cleaned = clean_environment({**TORCHRUN, "HF_HOME": "/models"}, Path("/run/t"))
    assert {name for name, value in cleaned.items() if value is None} == set(TORCHRUN)
    assert "HF_HOME" not in cleaned, "what is not named is inherited"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_trainers_allocator_settings_are_not_the_servers(name: str) -> None:
    cleaned = clean_environment({name: "expandable_segments:True"}, Path("/run/t"))
    assert cleaned[name] is None
    assert name not in clean_environment({}, Path("/run/t"))


def test_temporary_files_get_a_folder_of_their_own_but_compiled_code_stays() -> None:
    assert clean_environment({}, Path("/run/t"))["TMPDIR"] == "/run/t"
    cache = clean_environment({}, Path("/run/t"))["TORCHINDUCTOR_CACHE_DIR"]
    assert cache is not None
    assert "torchinductor_" in cache
    assert not cache.startswith("/run/t")
    kept = clean_environment({"TORCHINDUCTOR_CACHE_DIR": "/cache"}, Path("/run/t"))
    assert kept["TORCHINDUCTOR_CACHE_DIR"] == "/cache"


def test_two_ranks_on_one_gpu_are_told_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"two ranks of the trainer use GPU-a; call torch\.cuda\.set_device\(local_rank"
    ):
        gpu_environment(["GPU-a", "GPU-b", "GPU-a"])


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that prints what this file holds."""
    said = tmp_path / "said"
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=uuid,index ] && cat {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return said


def test_gpus_are_shown_by_their_numbers_on_the_bus_which_sglang_reads(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("GPU-a, 0\nGPU-b, 1\nGPU-c, 2\n")
    shown = {"CUDA_VISIBLE_DEVICES": "2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert gpu_environment(["GPU-c", "GPU-a"]) == shown


def test_gpus_without_a_number_are_shown_by_their_uuids(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("GPU-a, 0\n")
    assert gpu_environment(["MIG-b"]) == {"CUDA_VISIBLE_DEVICES": "MIG-b"}
    assert gpu_environment(["GPU-a", "MIG-b"]) == {"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b"}


@pytest.mark.parametrize(
    ("server_args", "env"),
    [({"device": "cpu"}, {}), ({"base_gpu_id": 0}, {}), ({"gpu_id_step": 2}, {}), ({}, {"CUDA_VISIBLE_DEVICES": "1"})],
)
def test_a_server_that_its_caller_has_placed_is_left_there(server_args: dict[str, object], env: dict[str, str]) -> None:
    assert trainer_gpu(server_args, dict(env)) is None


def test_a_host_knows_itself_again() -> None:
    assert host_identity() == host_identity()
    assert "pid:[" in host_identity()
    assert "net:[" in host_identity()
