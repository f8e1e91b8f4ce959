"""Weights over torch.distributed reach a real server as they do by shared memory, on every release and TP size."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapter import WeightSyncClient
from adapter.demo import tiny_model
from sidecar.v1 import weight_sync_pb2 as pb
from tests.e2e import sharded_trainer
from tests.e2e.engines import SMALL_BUCKET_BYTES, Stack, on_every_engine, on_tp2
from tests.fakes.gloo_ranks import gloo_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

RETURNS_WITHIN_S = 20.0


@contextmanager
def distributed(stack: Stack, bucket_bytes: int = SMALL_BUCKET_BYTES) -> Iterator[WeightSyncClient]:
    """A trainer of one rank that shares no memory with the engine, whatever its tp_size."""
    target = stack.target
    with WeightSyncClient(
        target, rank=0, tp_size=1, bucket_bytes=bucket_bytes, device="cpu", transport="distributed"
    ) as client:
        yield client


@on_every_engine
def test_tokens_and_checksums_are_those_of_shared_memory(stack: Stack) -> None:
    shared = {}
    for seed in (5, 6):
        stack.update(seed)
        shared[seed] = stack.tokens(), stack.http.rank_checksums()
    assert shared[5] != shared[6]
    with distributed(stack) as trainer:
        for seed in (5, 6, 5):
            result = trainer.update_weights(tiny_model.random_weights(seed), version=stack.new_version())
            assert (stack.tokens(), stack.http.rank_checksums()) == shared[seed]
            assert stack.http.weight_version() == result.weight_version
            assert result.cache_flushed
            assert result.num_posts > 1
        status = trainer.status()
    assert status.last_update.transport == pb.TRANSPORT_DISTRIBUTED
    assert status.group.backend == "gloo"
    assert status.group.world_size == 1 + stack.spec.tp_size


@on_every_engine
def test_one_bucket_is_one_post(stack: Stack) -> None:
    with distributed(stack, bucket_bytes=1 << 30) as trainer:
        result = trainer.update_weights(tiny_model.random_weights(1), version=stack.new_version(), verify=True)
    assert result.num_posts == 1
    assert result.verification in ("consistent", "unavailable")


@on_tp2
def test_weights_cut_over_more_ranks_than_the_engine_has_arrive_whole_and_every_rank_hears_of_it(
    stack: Stack, tmp_path: Path
) -> None:
    stack.update(5)
    expected = stack.tokens(), stack.http.rank_checksums()
    first, last = stack.new_version(), stack.new_version()
    with gloo_ranks(3, tmp_path) as ranks:
        told = ranks.call(sharded_trainer.send, stack.target, [(6, first), (7, first), (5, last)])
    assert [[rank[0], rank[2]] for rank in told] == [[first, last]] * 3
    refused, *heard = [rank[1] for rank in told]
    assert refused.startswith("UpdateRefused: ")
    assert "does not come after" in refused
    for one in heard:
        assert one.startswith(f"UpdateAborted: rank 0 aborted update 'sharded {first}, 1': ")
        assert "does not come after" in one
    assert (stack.tokens(), stack.http.rank_checksums()) == expected


@on_every_engine
def test_a_trainer_that_dies_in_a_broadcast_hangs_nobody_and_the_next_update_heals(stack: Stack) -> None:
    stack.update(5)
    expected = stack.tokens(), stack.http.rank_checksums()
    command = [sys.executable, "-m", "tests.e2e.broadcasting_trainer", stack.target, stack.new_version()]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dying,
        distributed(stack) as trainer,
    ):
        try:
            assert dying.stdout is not None
            assert dying.stdout.readline() == "half\n"
        finally:
            dying.kill()
        killed = time.monotonic()
        while (status := trainer.status()).state == pb.SIDECAR_STATE_APPLYING:
            assert time.monotonic() < killed + RETURNS_WITHIN_S, status
            time.sleep(0.05)
        assert status.state == pb.SIDECAR_STATE_DIRTY, status
        assert status.last_update.state == pb.UPDATE_STATE_FAILED
        assert not status.HasField("group")
        assert status.weight_version == ""
        trainer.update_weights(tiny_model.random_weights(5), version=stack.new_version())
        assert trainer.status().state == pb.SIDECAR_STATE_READY
    assert (stack.tokens(), stack.http.rank_checksums()) == expected
