"""Whether trainer and engine share memory, as far as it can be told."""

import pytest
import torch

from adapter.locality import shared_memory_id, shares_memory
from sidecar.v1 import weight_sync_pb2 as pb

CPU = torch.device("cpu")
ELSEWHERE = "another-boot:42"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")


def test_this_host_has_an_id_that_stays() -> None:
    assert shared_memory_id() == shared_memory_id() != ""


@pytest.mark.parametrize("device", [None, CPU])
def test_one_shared_memory_is_shared_and_another_is_not(device: torch.device | None) -> None:
    assert shares_memory(pb.EngineInfo(device="cpu", shared_memory_id=shared_memory_id()), device)
    assert not shares_memory(pb.EngineInfo(device="cpu", shared_memory_id=ELSEWHERE), device)


def test_what_is_not_known_is_tried_as_ever() -> None:
    assert shares_memory(pb.EngineInfo(), CPU)
    assert shares_memory(pb.EngineInfo(device="cpu"), CPU)
    assert shares_memory(pb.EngineInfo(device="cuda", gpu_uuids=[""]), None)


def test_an_engine_of_several_nodes_is_tried_as_ever() -> None:
    assert shares_memory(pb.EngineInfo(device="cpu", num_nodes=2, shared_memory_id=ELSEWHERE), CPU)
    assert not shares_memory(pb.EngineInfo(device="cpu", num_nodes=1, shared_memory_id=ELSEWHERE), CPU)


@without_gpu
def test_a_trainer_without_a_gpu_shares_none_with_an_engine_on_some() -> None:
    engine = pb.EngineInfo(device="cuda", gpu_uuids=["GPU-0d1f"], shared_memory_id=shared_memory_id())
    assert not shares_memory(engine, None)
    assert not shares_memory(engine, CPU)


def test_an_engine_whose_gpus_are_not_known_is_judged_by_its_shared_memory() -> None:
    assert shares_memory(pb.EngineInfo(device="cuda", shared_memory_id=shared_memory_id()), None)
    assert not shares_memory(pb.EngineInfo(device="cuda", shared_memory_id=ELSEWHERE), None)
