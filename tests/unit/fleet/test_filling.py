"""Whatever becomes of an update, its gathers are gone through once."""

from __future__ import annotations

import pytest
import torch

from adapter.fleet.filling import Filling
from adapter.fleet.regions import PlainRegions
from adapter.outgoing import Outgoing, Planner, WholeTensors
from tests.unit.fleet.gathers import Counted, counted

CPU = torch.device("cpu")
ONE_TENSOR = 64


def outgoing(tensors: list[Counted], *, iterator: bool) -> Outgoing | WholeTensors:
    pairs = ((tensor.name, tensor) for tensor in tensors)
    specs = [tensor.spec for tensor in tensors] if iterator else None
    return Planner(ONE_TENSOR, (), dense=True).outgoing(pairs, specs)


@pytest.mark.parametrize("filled", [None, 0, 1, 3])
@pytest.mark.parametrize("iterator", [False, True])
def test_gathers_are_gone_through_once_wherever_it_ended(iterator: bool, filled: int | None) -> None:
    tensors = counted()
    filling = Filling(outgoing(tensors, iterator=iterator), PlainRegions(2), CPU)
    if filled is not None:
        buckets = filling.start()
        for bucket in range(filled):
            buckets.fill(bucket)
    filling.forgo()
    assert [tensor.times for tensor in tensors] == [1, 1, 1]


@pytest.mark.parametrize("iterator", [False, True])
def test_what_is_gathered_can_be_sent_once(iterator: bool) -> None:
    filling = Filling(outgoing(counted(), iterator=iterator), PlainRegions(2), CPU)
    assert filling.can_be_sent
    filling.start()
    assert not filling.can_be_sent


def test_whole_tensors_can_be_sent_as_often_as_wanted() -> None:
    tensor = torch.arange(4.0)
    cargo = Planner(ONE_TENSOR, (), dense=True).outgoing([("a", tensor)], None)
    filling = Filling(cargo, PlainRegions(1), CPU)
    for _ in range(2):
        flat = filling.start().fill(0).flat
        assert flat[:16].view(torch.float32).tolist() == tensor.tolist()
        assert filling.can_be_sent
    filling.forgo()
