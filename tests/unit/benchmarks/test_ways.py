"""What one run measures, and in which order."""

import pytest
import torch

from benchmarks.peers import PEERS
from benchmarks.peers.slime_flattened import buckets_of
from benchmarks.sync.ways import WAYS, chosen


def names(wanted: str, device: str = "cuda") -> list[str]:
    return [way.name for way in chosen(wanted, device)]


def test_all_ways_come_in_one_order_separate_tensors_first() -> None:
    assert chosen("all", "cuda") == list(WAYS)
    layouts = [way.flat for way in WAYS]
    assert layouts == sorted(layouts)


def test_groups_and_names_are_put_into_the_runs_own_order() -> None:
    assert names("replay_in_place,peers,floor_tensors") == ["floor_tensors", *PEERS, "replay_in_place"]


def test_on_the_cpu_no_payload_is_posted_twice() -> None:
    assert set(names("all")) - set(names("all", "cpu")) == {"replay_direct"}


def test_an_unknown_way_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="--ways fast is none of all, peers, floor, stock, replay, floor_tensors"):
        chosen("peers,fast", "cpu")


def test_a_peers_bucket_is_full_before_the_next_one_begins_and_a_large_tensor_has_one_alone() -> None:
    tensors = [(str(size), torch.empty(size, dtype=torch.uint8)) for size in (4, 6, 20, 1, 9, 1)]
    sizes = [[tensor.nbytes for _, tensor in bucket] for bucket in buckets_of(tensors, 10)]
    assert sizes == [[4, 6], [20], [1, 9], [1]]
