"""What the trainer's side adds to an update: memory in place, values looked at, ranks that give up, bounds."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from adapter import (
    MemoryNotExportable,
    SidecarUnreachable,
    TensorSpec,
    UpdateAborted,
    UpdateResult,
    WeightSyncClient,
    WeightSyncError,
)
from adapter.exportable import allocate_flat
from adapter.sources import LazyTensor
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, Pair

TIMEOUT_S = 20.0
CPU = torch.device("cpu")


@contextmanager
def clients(pair: Pair, **options: Any) -> Iterator[list[WeightSyncClient]]:
    with ExitStack() as stack:
        opened = [WeightSyncClient(pair.target, rank=rank, tp_size=2, **options) for rank in range(2)]
        yield [stack.enter_context(client) for client in opened]
        assert [client.unreleased_bytes for client in opened] == [0, 0]


def on_both(ranks: Sequence[WeightSyncClient], tensors: Sequence[Any], **options: Any) -> list[object]:
    """Rank r sends ``tensors[r]``; its result, or what it raised."""

    def send(rank: int) -> object:
        try:
            return ranks[rank].update_weights(tensors[rank], timeout=TIMEOUT_S, **options)
        except (WeightSyncError, ValueError, RuntimeError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(send, range(2)))


def flat_model(value: int) -> list[tuple[str, torch.Tensor]]:
    """Three tensors in two pieces of exportable memory."""
    first, second = allocate_flat(256, CPU).fill_(value), allocate_flat(128, CPU).fill_(value + 1)
    return [("a", first[:64]), ("b", first[128:160].view(torch.bfloat16)), ("c", second.view(torch.float32))]


def test_tensors_in_place_arrive_from_where_they_lie_update_after_update(pair: Pair) -> None:
    models = [flat_model(1), flat_model(1)]
    with clients(pair) as ranks:
        for number in range(3):
            for model in models:
                model[0][1].fill_(number)
            results = on_both(ranks, models, version=f"in place {number}", in_place=True)
            assert all(isinstance(result, UpdateResult) for result in results), results
            assert pair.posts().count(LOAD) == 2 * (number + 1)  # one for each piece of memory
        seen = pair.engine.loaded[1]["a"]
        assert [ranks[0]._local._buffers.num_bytes, ranks[1]._local._buffers.num_bytes] == [0, 0]
        copies = on_both(ranks, [[(n, t.clone()) for n, t in model] for model in models], version="copied")
        assert all(isinstance(result, UpdateResult) for result in copies), copies
    assert pair.engine.loaded[1]["a"] == seen


def parameters(value: int) -> list[tuple[str, torch.Tensor]]:
    """The same names and shapes, in memory of their own."""
    return [(name, torch.nn.Parameter(tensor, requires_grad=False)) for name, tensor in flat_model(value)]


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "staged"])
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 128])
def test_weights_that_come_again_arrive_as_they_are_now_wherever_they_lie_by_then(
    pair: Pair, in_place: bool, bucket_bytes: int
) -> None:
    name = f"again {in_place} {bucket_bytes}"
    models, moved = [parameters(1), parameters(1)], [parameters(7), parameters(7)]
    seen = []
    with clients(pair, bucket_bytes=bucket_bytes) as ranks:
        for step in range(5):
            if step == 1:
                for _, tensor in (*models[0], *models[1]):
                    tensor.fill_(3)
            if step == 3:  # an optimiser that gives a parameter other memory
                for pairs, others in zip(models, moved, strict=True):
                    pairs[1][1].data = others[1][1].data
            results = on_both(ranks, models, version=f"{name} {step}", in_place=in_place)
            assert all(isinstance(result, UpdateResult) for result in results), results
            seen.append(dict(pair.engine.loaded[0]))
    assert seen[1] == seen[2]
    assert all(seen[0][name] != seen[1][name] for name in ("a", "b", "c"))
    assert seen[3]["b"] != seen[2]["b"]
    assert [seen[3][name] for name in ("a", "c")] == [seen[2][name] for name in ("a", "c")]
    assert seen[3] == seen[4]


def test_a_request_after_the_first_is_of_one_size_whatever_the_model(pair: Pair) -> None:
    sizes: dict[int, int] = {}
    for num_tensors in (3, 3000):
        pairs = [(f"w{number}", torch.ones(2)) for number in range(num_tensors)]
        with clients(pair) as ranks:
            for step in range(2):
                results = on_both(ranks, [pairs, pairs], version=f"{num_tensors} tensors, {step}")
                assert all(isinstance(result, UpdateResult) for result in results), results
            plan = ranks[0]._local._planner.outgoing(pairs, None).plan
            sizes[num_tensors] = ranks[0]._local._sender._known.reference(plan).ByteSize()
    assert sizes == {3: 66, 3000: 66}  # with the header and a handle, some 170 bytes


def test_memory_that_cannot_be_exported_in_place_is_an_error_and_nothing_is_sent(pair: Pair) -> None:
    with clients(pair) as (client, _):
        with pytest.raises(MemoryNotExportable, match="tensor w does not lie in a file"):
            client.update_weights([("w", torch.ones(2))], version="not in place", in_place=True)
        with pytest.raises(ValueError, match="in_place sends tensors from where they lie"):
            client.update_weights([("w", torch.ones(2))], version="not in place", in_place=True, specs=[])
    pair.assert_untouched()


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 64], ids=["one-bucket", "buckets"])
def test_nan_on_one_rank_is_told_to_the_others_before_the_engine_is_touched(pair: Pair, bucket_bytes: int) -> None:
    good, bad = torch.ones(32), torch.ones(32)
    bad[7] = float("nan")
    with clients(pair, bucket_bytes=bucket_bytes) as ranks:
        version = f"nan {bucket_bytes}"
        aborted, refused = on_both(ranks, [[("w", good)], [("w", bad)]], version=version, check_finite=True)
    assert isinstance(refused, ValueError)
    assert str(refused) == "tensor w holds NaN or infinity; it was not sent"
    assert isinstance(aborted, UpdateAborted), aborted
    assert "rank 1" in str(aborted)
    assert "holds NaN or infinity" in str(aborted)
    pair.assert_untouched()


def test_values_of_an_iterator_cannot_be_looked_at_first(pair: Pair) -> None:
    with clients(pair) as (client, _), pytest.raises(ValueError, match="give a list instead of specs"):
        client.update_weights(iter(()), version="blind", specs=[_spec("w")], check_finite=True)


class Breaking(LazyTensor):
    """A gather that fails, as when a peer has died."""

    dtype, shape = torch.float32, (4,)

    def write(self, destination: torch.Tensor) -> None:
        raise RuntimeError("connection closed by peer")


def test_a_gather_that_fails_on_one_rank_ends_the_update_on_all(pair: Pair) -> None:
    with clients(pair) as ranks:
        tensors = [[("w", torch.ones(4))], [("w", Breaking())]]
        aborted, broken = on_both(ranks, tensors, version="broken gather")
    assert isinstance(broken, RuntimeError)
    assert not isinstance(broken, WeightSyncError)
    assert isinstance(aborted, UpdateAborted), aborted
    assert "RuntimeError: connection closed by peer" in str(aborted)
    pair.assert_untouched()


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("w", torch.ones(2)), ("w", torch.ones(2))], "the name w comes 2 times"),
        ([("w", torch.empty(2, device="meta"))], "tensor w is on the meta device"),
        ([("w", [1.0])], "tensor w: a list cannot be sent"),
    ],
    ids=["twice", "meta", "list"],
)
def test_bad_tensors_are_refused_before_anything_is_sent(pair: Pair, pairs: Any, words: str) -> None:
    with clients(pair) as (client, _):
        with pytest.raises(ValueError, match=re.escape(words)):
            client.update_weights(pairs, version="bad")
        assert client._local._buffers.num_bytes == 0
    pair.assert_untouched()


def test_what_is_fused_is_sent_side_by_side_whatever_the_order(pair: Pair) -> None:
    names = [f"model.layers.0.self_attn.{part}.weight" for part in ("q_a_proj", "o_proj", "kv_a_proj_with_mqa")]
    tensors = [(name, torch.ones(16)) for name in names]
    with clients(pair, bucket_bytes=128) as ranks:
        results = on_both(ranks, [tensors, tensors], version="fused")
    assert all(isinstance(result, UpdateResult) for result in results), results
    assert [getattr(result, "num_posts", 0) for result in results] == [2, 2]


def test_an_iterator_that_tears_a_group_apart_is_told_how_to_yield_it(pair: Pair) -> None:
    names = [f"l.{part}.weight" for part in ("q_a_proj", "o_proj", "kv_a_proj_with_mqa")]
    with clients(pair) as (client, _), pytest.raises(ValueError, match=r"fuses l\.kv_a_proj_with_mqa\.weight with a"):
        client.memory_needed((), specs=[_spec(name) for name in names])  # planning alone finds it


def _spec(name: str) -> TensorSpec:
    return TensorSpec(name, torch.float32, (16,))


def test_memory_is_stated_before_it_is_taken_and_is_not_exceeded(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    tensors = [(f"w{number}", torch.ones(16)) for number in range(7)]
    with clients(pair, bucket_bytes=128) as ranks:
        need = ranks[0].memory_needed(tensors)
        with caplog.at_level(logging.INFO, logger="adapter.local"):
            on_both(ranks, [tensors, tensors], version="stated 1")
            on_both(ranks, [tensors, tensors], version="stated 2")
        assert ranks[0]._local._buffers.num_bytes == 2 * 128 <= need.total
        said = [record.message for record in caplog.records if record.name == "adapter.local"]
        assert sorted(said) == [
            f"updates take at most {need.total} bytes of rank {rank} on cpu: staging buffers of 192 and 192 bytes, "
            "and 0 bytes to gather"
            for rank in range(2)
        ]
        ranks[0].release_staging()
        assert ranks[0]._local._buffers.num_bytes == 0
        assert all(isinstance(r, UpdateResult) for r in on_both(ranks, [tensors, tensors], version="stated 3"))


TRAINER = """
import json, re, sys, torch
from pathlib import Path
from adapter import WeightSyncClient
from adapter.sources import LazyTensor

class Generated(LazyTensor):
    dtype, shape = torch.float32, (1 << 20,)
    def __init__(self, value): self.value = value
    def write(self, destination): destination.fill_(self.value)

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

bucket, num_buckets = 16 << 20, 20
tensors = [(f"w{number}", Generated(number)) for number in range(4 * num_buckets)]
with WeightSyncClient(sys.argv[1], rank=0, tp_size=1, bucket_bytes=bucket) as client:
    client.update_weights(tensors[:1], version="warm")  # gRPC's own buffers and threads
    client.release_staging()
    need = client.memory_needed(tensors)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    result = client.update_weights(tensors, version="large")
    grown = (kilobytes("VmHWM") - before) * 1024
print(json.dumps({"grown": grown, "stated": need.total, "posts": result.num_posts}))
"""


def test_a_model_of_twenty_buckets_takes_two_buckets_of_memory(start: StartPair) -> None:
    pair = start(tp_size=1)
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, pair.target], capture_output=True, text=True, timeout=110, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["posts"] == 20
    assert figures["stated"] == 2 * ((16 << 20) + 64)
    assert 16 << 20 < figures["grown"] <= figures["stated"] + (4 << 20), figures


def test_a_rank_that_comes_after_the_others_gave_up_is_told_so_once_and_may_then_try_again(pair: Pair) -> None:
    weights, bad = [("w", torch.ones(4))], [("w", torch.full((4,), float("inf")))]
    with clients(pair) as ranks:
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            ranks[0].update_weights(bad, version="came late", check_finite=True)
        with pytest.raises(UpdateAborted, match="rank 0"):
            ranks[1].update_weights(weights, version="came late", timeout=TIMEOUT_S)
        assert ranks[1].unreleased_bytes == 0
        pair.assert_untouched()
        results = on_both(ranks, [weights, weights], version="came late")
    assert all(isinstance(result, UpdateResult) for result in results), results


def test_a_tensor_that_one_rank_cannot_send_is_told_to_the_others(pair: Pair) -> None:
    good, bad = [("w", torch.ones(4))], [("w", torch.empty(4, device="meta"))]
    with clients(pair) as ranks:
        aborted, refused = on_both(ranks, [good, bad], version="meta on one")
    assert isinstance(refused, ValueError)
    assert isinstance(aborted, UpdateAborted), aborted
    assert "tensor w is on the meta device" in str(aborted)
    pair.assert_untouched()


class Gathered(LazyTensor):
    """Notes whether its rank has taken part."""

    dtype, shape = torch.float32, (4,)

    def __init__(self) -> None:
        self.forgone = 0

    def write(self, destination: torch.Tensor) -> None:
        raise AssertionError("nothing is sent")

    def forgo(self, device: torch.device) -> None:
        self.forgone += 1


def test_a_rank_whose_sidecar_is_gone_still_takes_part_in_the_gathers_of_the_others() -> None:
    """They may feed another engine, whose sidecar is well."""
    tensors = [Gathered(), Gathered()]
    pairs = [(f"w{number}", tensor) for number, tensor in enumerate(tensors)]
    with WeightSyncClient("unix:/nowhere/sidecar.sock", rank=0, tp_size=2) as client:
        with pytest.raises(SidecarUnreachable):
            client.update_weights(pairs, version="1")
        assert [tensor.forgone for tensor in tensors] == [1, 1]
        client.give_up(pairs, version="2", cause=ValueError("not now"))
        assert [tensor.forgone for tensor in tensors] == [2, 2]


class OutOfMemory(Gathered):
    """Cannot be described any further than its first look."""

    def local_tensors(self) -> Sequence[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_error_that_is_none_of_ours_does_not_keep_the_others_waiting_either(pair: Pair) -> None:
    tensors: list[Any] = [[("w", torch.ones(4))], [("w", OutOfMemory())]]
    with clients(pair) as ranks:
        aborted, broken = on_both(ranks, tensors, version="out of memory")
    assert isinstance(broken, torch.OutOfMemoryError)
    assert isinstance(aborted, UpdateAborted), aborted
    assert "OutOfMemoryError" in str(aborted)
    assert tensors[1][0][1].forgone == 1
