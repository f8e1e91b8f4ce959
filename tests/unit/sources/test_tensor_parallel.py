"""A tensor-parallel trainer's shards, cut here as Megatron cuts them, arrive as the whole tensors they came from."""

import pytest
import torch

from adapter.sources import Column, GatedColumn, GroupedQkv, Replicated, Row
from adapter.sources.tensor_parallel import Layout
from tests.fakes.gloo_ranks import GlooRanks
from tests.unit.sources import on_ranks

NUM_RANKS = 3
HIDDEN = 4
HEAD_DIM = 2
HEADS = 12
KV_HEADS = 6


def cut(whole: torch.Tensor, dim: int) -> list[torch.Tensor]:
    return [part.clone() for part in whole.chunk(NUM_RANKS, dim)]


def joined(
    ranks: GlooRanks, shards: list[torch.Tensor], layout: Layout, sent: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """What arrives, the same on every rank."""
    first, *others = ranks.call(on_ranks.joined, shards, layout, sent)
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())
    return first


@pytest.mark.parametrize(("layout", "dim"), [(Column("w"), 0), (Row("w"), 1)], ids=["column-parallel", "row-parallel"])
@pytest.mark.parametrize("sent", [None, torch.bfloat16], ids=["as-it-is", "cast"])
def test_shards_are_joined(ranks: GlooRanks, layout: Layout, dim: int, sent: torch.dtype | None) -> None:
    whole = on_ranks.numbers((6, 9))
    arrived = joined(ranks, cut(whole, dim), layout, sent)
    assert torch.equal(arrived["w"], whole.to(sent or whole.dtype))


def test_a_replicated_tensor_is_sent_as_it_is(ranks: GlooRanks) -> None:
    whole = on_ranks.numbers((5,))
    assert torch.equal(joined(ranks, [whole] * NUM_RANKS, Replicated("w"))["w"], whole)


@pytest.mark.parametrize("num_rows", [7, 4, 1], ids=str)
def test_the_padding_of_a_vocabulary_is_left_out(ranks: GlooRanks, num_rows: int) -> None:
    """The trainer has padded it to 9 rows, 3 per rank; the last rank may hold nothing but padding."""
    padded = on_ranks.numbers((9, HIDDEN))
    arrived = joined(ranks, cut(padded, 0), Column("embed", num_rows=num_rows))
    assert torch.equal(arrived["embed"], padded[:num_rows])


def test_gate_and_up_of_one_parameter_are_told_apart(ranks: GlooRanks) -> None:
    gate, up = on_ranks.numbers((6, HIDDEN), seed=1), on_ranks.numbers((6, HIDDEN), seed=2)
    shards = [torch.cat(halves) for halves in zip(cut(gate, 0), cut(up, 0), strict=True)]
    arrived = joined(ranks, shards, GatedColumn("gate", "up"))
    assert torch.equal(arrived["gate"], gate)
    assert torch.equal(arrived["up"], up)


@pytest.mark.parametrize("tail", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_queries_keys_and_values_of_one_parameter_are_told_apart(ranks: GlooRanks, tail: tuple[int, ...]) -> None:
    q = on_ranks.numbers((HEADS * HEAD_DIM, *tail), seed=1)
    k = on_ranks.numbers((KV_HEADS * HEAD_DIM, *tail), seed=2)
    v = on_ranks.numbers((KV_HEADS * HEAD_DIM, *tail), seed=3)
    groups = zip(q.chunk(KV_HEADS), k.chunk(KV_HEADS), v.chunk(KV_HEADS), strict=True)
    fused = torch.cat([part for group in groups for part in group])
    layout = GroupedQkv(q="q", k="k", v="v", num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    arrived = joined(ranks, cut(fused, 0), layout)
    assert {name: torch.equal(arrived[name], whole) for name, whole in (("q", q), ("k", k), ("v", v))} == {
        "q": True,
        "k": True,
        "v": True,
    }


@pytest.mark.parametrize("layout", [Column("w"), Row("w"), GatedColumn("w", "x")], ids=lambda one: type(one).__name__)
def test_a_rank_that_gives_up_keeps_nobody_waiting(ranks: GlooRanks, layout: Layout) -> None:
    shards = cut(on_ranks.numbers((6, 6)), 0)
    answers = ranks.call(on_ranks.joined, shards, layout, None, 1)
    assert [len(answer) for answer in answers] == [len(answers[0]), 0, len(answers[0])]
    assert len(answers[0]) >= 1
