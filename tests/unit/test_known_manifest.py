"""A plan that the sidecar has taken before is named by its digest."""

import pytest
import torch

from adapter.known_manifest import KnownManifests
from adapter.planner import Plan, TensorSpec, plan


def plan_of(name: str) -> Plan:
    return plan([TensorSpec(name, torch.float32, (2,))], 64)


def test_plans_in_turn_keep_their_digests() -> None:
    known, plans = KnownManifests(), [plan_of("base"), plan_of("merged")]
    for cut in plans:
        assert known.reference(cut).HasField("manifest")
        known.remember(cut, cut.names()[0])
    for _ in range(2):
        assert [known.reference(cut).digest for cut in plans] == ["base", "merged"]
    assert known.reference(plan_of("merged")).digest == "merged"


@pytest.mark.parametrize("num_tensors", [1, 5000])
def test_a_reference_to_a_known_plan_is_of_one_size(num_tensors: int) -> None:
    known = KnownManifests()
    cut = plan([TensorSpec(f"w{number}", torch.float32, (2,)) for number in range(num_tensors)], 1 << 30)
    known.remember(cut, "0" * 64)
    assert known.reference(cut).ByteSize() == 66
