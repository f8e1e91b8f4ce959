"""DTensors and ShardedTensors arrive whole, whatever their shapes, cuts and dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard

from tests.fakes.gloo_ranks import GlooRanks
from tests.unit.sources import on_ranks

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.integers(min_value=1, max_value=9), min_size=2, max_size=3).map(tuple)
PLACEMENTS = st.sampled_from([Replicate(), Shard(0), Shard(1)])
thorough = settings(max_examples=60)  # the ranks are asked once per example, so examples take a millisecond


def test_any_dtensor_arrives_whole_on_every_rank(ranks: GlooRanks) -> None:
    @thorough
    @given(SHAPES, PLACEMENTS, DTYPES, DTYPES)
    def check(shape: tuple[int, ...], placement: Placement, dtype: torch.dtype, sent: torch.dtype) -> None:
        assert all(ranks.call(on_ranks.gather_dtensor, shape, [placement], dtype, sent))

    check()


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (7, 4), (2, 3)], ids=str)
def test_a_tensor_of_fewer_rows_than_ranks_or_of_uneven_ones_arrives_whole(
    ranks: GlooRanks, shape: tuple[int, ...]
) -> None:
    assert all(ranks.call(on_ranks.gather_dtensor, shape, [Shard(0)], torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize(
    "placements",
    [[Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)], [Shard(0), Shard(1)]],
    ids=str,
)
def test_a_mesh_of_two_dimensions_is_gathered_too(ranks: GlooRanks, placements: list[Placement]) -> None:
    assert all(ranks.call(on_ranks.gather_over_two_dimensions, (7, 6), placements))


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_a_rank_that_gives_up_still_takes_part_so_that_the_next_gather_is_the_right_one(
    ranks: GlooRanks, placement: Placement
) -> None:
    assert all(ranks.call(on_ranks.one_gives_up_in_the_middle, (6, 6), [placement]))


def test_a_tensor_cut_by_rows_is_gathered_without_a_second_copy(ranks: GlooRanks) -> None:
    rows, columns = Shard(0), Shard(1)
    assert ranks.call(on_ranks.extra_bytes, (6, 4), [rows], torch.float32) == [0, 0, 0]
    assert ranks.call(on_ranks.extra_bytes, (6, 4), [rows], torch.bfloat16) == [2 * 4 * 2] * 3  # the cast shard
    assert ranks.call(on_ranks.extra_bytes, (6, 4), [columns], torch.float32) == [2 * 6 * 4 * 4] * 3


@pytest.mark.parametrize("num_rows", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16], ids=str)
def test_a_sharded_tensor_of_fsdp1_arrives_whole(ranks: GlooRanks, num_rows: int, sent: torch.dtype) -> None:
    assert all(ranks.call(on_ranks.gather_sharded_tensor, num_rows, 3, sent))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_stacked_experts_arrive_one_by_one(ranks: GlooRanks, num_experts: int, placement: Placement) -> None:
    gate_up = on_ranks.numbers((num_experts, 4, 3)).to(torch.bfloat16)
    down = on_ranks.numbers((num_experts, 3, 2)).to(torch.bfloat16)
    for arrived in ranks.call(on_ranks.unstacked, num_experts, [placement], torch.bfloat16):
        assert len(arrived) == 3 * num_experts
        for expert in range(num_experts):
            prefix = f"mlp.experts.{expert}"
            assert torch.equal(arrived[f"{prefix}.gate_proj.weight"], gate_up[expert, :2])
            assert torch.equal(arrived[f"{prefix}.up_proj.weight"], gate_up[expert, 2:])
            assert torch.equal(arrived[f"{prefix}.down_proj.weight"], down[expert])


@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16], ids=str)
def test_the_sharded_state_dict_of_a_real_fsdp1_module_arrives_whole(ranks: GlooRanks, sent: torch.dtype) -> None:
    assert all(ranks.call(on_ranks.fsdp1_arrives_whole, sent))


def test_a_sharded_tensor_of_a_part_of_the_trainer_arrives_whole_there(ranks: GlooRanks) -> None:
    assert all(ranks.call(on_ranks.gather_sharded_tensor_of_a_part, 5))
