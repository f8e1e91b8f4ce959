"""The trainer's surface against a real sidecar: one client per rank, real torch memory, nothing left behind."""

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch

from adapter import (
    EngineUnreachable,
    RanksMissing,
    SidecarUnreachable,
    TensorSpec,
    UpdateAborted,
    UpdateFailed,
    UpdateRefused,
    UpdateResult,
    UpdateStillApplying,
    WeightSyncClient,
    WeightSyncError,
)
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, NO_SESSIONS, SESSIONS, Pair, expected_posts, wait_until

Clients = Sequence[WeightSyncClient]
Sync = Callable[[WeightSyncClient], object]
TIMEOUT_S = 20.0


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(16, 8, generator=generator),
        "model.norm.weight": torch.randn(8, generator=generator).to(torch.bfloat16),
        "model.odd.weight": torch.randn(3, 5, generator=generator).t(),  # not contiguous
        "model.step": torch.tensor(seed),
    }


@contextmanager
def clients(pair: Pair, *, bucket_bytes: int = 1 << 20) -> Iterator[Clients]:
    """One per rank; nothing of theirs may be left over."""
    with ExitStack() as stack:
        opened = [WeightSyncClient(pair.target, rank=r, tp_size=2, bucket_bytes=bucket_bytes) for r in range(2)]
        yield [stack.enter_context(client) for client in opened]
        assert [client.unreleased_bytes for client in opened] == [0, 0]


def on_all(ranks: Clients, sync: Sync) -> list[object]:
    """Every rank at once; its result, or what it raised."""

    def guarded(client: WeightSyncClient) -> object:
        try:
            return sync(client)
        except (WeightSyncError, ValueError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(guarded, ranks))


def send(version: str, timeout: float = TIMEOUT_S, seed: int = 0) -> Sync:
    return lambda client: client.update_weights(weights(seed).items(), version=version, timeout=timeout)


def send_verified(version: str, seed: int) -> Sync:
    digest = f"seed {seed}"
    return lambda client: client.update_weights(
        weights(seed).items(), version=version, verify=True, content_digest=digest, timeout=TIMEOUT_S
    )


@pytest.mark.parametrize("pair", [SESSIONS, NO_SESSIONS], indirect=True)
@pytest.mark.parametrize(("bucket_bytes", "num_posts"), [(1 << 20, 1), (600, 2), (1, 4)])
def test_every_rank_calls_once_and_the_engine_serves_the_version(
    pair: Pair, bucket_bytes: int, num_posts: int, request: pytest.FixtureRequest
) -> None:
    version = f"step {bucket_bytes}"
    with clients(pair, bucket_bytes=bucket_bytes) as ranks:
        results = on_all(ranks, send(version))
    for result in results:
        assert not isinstance(result, Exception), result
        assert (getattr(result, "weight_version", ""), getattr(result, "num_posts", 0)) == (version, num_posts)
    assert pair.posts() == expected_posts(request.node.callspec.params["pair"], num_posts)
    assert pair.engine.weight_version == version
    assert set(pair.engine.loaded[0]) >= set(weights())
    assert [pair.engine.loaded[0][name] == pair.engine.loaded[1][name] for name in weights()] == [True] * 4


def test_equal_weights_are_equal_in_the_engine_whatever_the_buckets_and_others_are_not(pair: Pair) -> None:
    seen = []
    for number, (bucket_bytes, seed) in enumerate([(1 << 20, 1), (1, 1), (1 << 20, 2)]):
        with clients(pair, bucket_bytes=bucket_bytes) as ranks:
            on_all(ranks, send(f"equal {number}", seed=seed))
        seen.append({name: pair.engine.loaded[1][name] for name in weights()})
    assert seen[0] == seen[1]
    assert all(seen[0][name] != seen[2][name] for name in weights())


def test_the_second_update_sends_the_digest_alone_and_the_manifest_when_that_is_forgotten(pair: Pair) -> None:
    with clients(pair) as ranks:
        on_all(ranks, send("digest 0"))
        on_all(ranks, send("digest 1"))
        for client in ranks:
            known = client._local._sender._known
            ((plan, _),) = known._digests._entries
            known.remember(plan, "0" * 64)  # as after a restart of the sidecar
        results = on_all(ranks, send("digest 2"))
        assert not [result for result in results if isinstance(result, Exception)]
        outcome = ranks[0].get_update("digest 2")
        assert (outcome.state, outcome.update_id) == (pb.UPDATE_STATE_COMMITTED, "digest 2")
    assert pair.engine.weight_version == "digest 2"


def test_an_iterator_is_consumed_bucket_by_bucket(pair: Pair) -> None:
    specs = [TensorSpec(f"w{n}", torch.float32, (16,)) for n in range(8)]
    alive: list[int] = []

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for number, spec in enumerate(specs):
            alive.append(number)
            yield spec.name, torch.full(spec.shape, float(number))

    with clients(pair, bucket_bytes=64) as ranks:
        results = on_all(ranks, lambda c: c.update_weights(pairs(), version="iterator", specs=specs, timeout=TIMEOUT_S))
    assert not [result for result in results if isinstance(result, Exception)]
    assert len(alive) == 2 * len(specs)
    assert pair.posts().count(LOAD) == len(specs)


def test_a_version_that_was_served_is_refused_under_any_id(pair: Pair) -> None:
    with clients(pair) as ranks:
        on_all(ranks, send("same"))
        refused = on_all(ranks, send("same"))
        assert {getattr(error, "reason", "") for error in refused} == {"UPDATE_ID_REUSED"}
        assert all(client.unreleased_bytes == 0 for client in ranks)
        again = on_all(
            ranks, lambda c: c.update_weights(weights().items(), version="same", update_id="same.2", timeout=TIMEOUT_S)
        )
    assert {getattr(error, "reason", "") for error in again} == {"VERSION_NOT_NEW"}


def test_a_missing_rank_is_named_and_its_memory_is_back(pair: Pair) -> None:
    with clients(pair) as ranks:
        with pytest.raises(RanksMissing, match="for rank 1 to arrive; the engine was not touched") as raised:
            send("missing", timeout=2.5)(ranks[0])
        assert raised.value.details["ranks"] == "1"
        assert ranks[0].unreleased_bytes == 0
    pair.assert_untouched()


def test_a_missing_rank_of_a_bucketed_update_is_named_and_its_memory_is_back(pair: Pair) -> None:
    with clients(pair, bucket_bytes=1) as ranks:
        with pytest.raises(RanksMissing, match="for rank 1"):
            send("missing bucketed", timeout=2.5)(ranks[0])
        assert ranks[0].unreleased_bytes == 0
    pair.assert_untouched()


def test_ranks_with_other_tensors_are_told_which(pair: Pair) -> None:
    with clients(pair) as ranks:
        errors = on_all(
            ranks,
            lambda c: c.update_weights(
                [("w", torch.zeros(4 + c.rank))], version="differ", update_id="differ", timeout=TIMEOUT_S
            ),
        )
        assert all(isinstance(error, UpdateAborted) for error in errors), errors
        assert all("differ: tensor 'w': float32" in str(error) for error in errors)
        assert [client.unreleased_bytes for client in ranks] == [0, 0]
    pair.assert_untouched()


def test_a_trainer_of_another_size_is_refused(pair: Pair) -> None:
    with WeightSyncClient(pair.target, rank=0, tp_size=4) as client:
        with pytest.raises(UpdateRefused, match="sends from 4 ranks, but the engine has tp_size 2"):
            send("too many")(client)
        assert client.unreleased_bytes == 0
    pair.assert_untouched()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([], "named_tensors yielded no tensor"),
        ([("w", torch.zeros(2, dtype=torch.complex64))], "dtype torch.complex64 cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_a_value_error_before_anything_is(
    pair: Pair, tensors: list[tuple[str, torch.Tensor]], said: str
) -> None:
    with clients(pair) as (client, _):
        with pytest.raises(ValueError, match=said):
            client.update_weights(tensors, version="unsendable")
        assert client.unreleased_bytes == 0
    pair.assert_untouched()


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 64])
def test_pairs_that_do_not_match_their_specs_are_a_value_error_and_the_others_are_told(
    pair: Pair, bucket_bytes: int
) -> None:
    specs = [TensorSpec(f"w{n}", torch.float32, (16,)) for n in range(3)]
    short = [(spec.name, torch.zeros(16)) for spec in specs[:1]]
    with clients(pair, bucket_bytes=bucket_bytes) as (client, _):
        with pytest.raises(ValueError, match=r"expected tensor w1 torch.float32 \[16\] next, but named_tensors has"):
            client.update_weights(short, version=f"short {bucket_bytes}", specs=specs, timeout=TIMEOUT_S)
        assert client.unreleased_bytes == 0
    pair.assert_untouched()


def test_an_update_that_broke_off_is_healed_by_calling_again(start: StartPair) -> None:
    pair = start()
    pair.engine.fault(LOAD, Fault.SKIP_HALF)
    pair.engine.fault("/end_weight_update", Fault.REFUSE, message="no")
    with clients(pair) as ranks:
        errors = on_all(ranks, send("heals itself"))
        assert all(isinstance(error, UpdateFailed) and error.num_posted == 1 for error in errors), errors
        assert ranks[0].status().state == pb.SIDECAR_STATE_DIRTY
        assert pair.is_paused()
        results = on_all(ranks, send("heals itself"))
    assert [getattr(result, "update_id", result) for result in results] == ["heals itself"] * 2
    assert pair.engine.weight_version == "heals itself"
    assert not pair.is_paused()


def test_buckets_that_the_engine_never_saw_are_taken_back_when_a_bucketed_update_fails(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/begin_weight_update", Fault.REFUSE, message="not today")
    with clients(pair, bucket_bytes=1) as ranks:
        errors = on_all(ranks, send("never seen"))
        assert {type(error) for error in errors} <= {UpdateRefused, UpdateAborted}, errors
        assert any("not today" in str(error) for error in errors)
        assert [client.unreleased_bytes for client in ranks] == [0, 0]
        assert not pair.is_paused()
        assert not [r for r in on_all(ranks, send("never seen")) if isinstance(r, Exception)]


def test_a_deadline_in_the_middle_of_loading_is_told_apart_and_the_outcome_can_be_asked_for(pair: Pair) -> None:
    pair.engine.fault(LOAD, Fault.LATE, delay_s=5.0)
    with clients(pair) as ranks:
        errors = on_all(ranks, send("late", timeout=2.5))
        assert all(isinstance(error, UpdateStillApplying) for error in errors), errors
        wait_until(lambda: ranks[0].get_update("late").state == pb.UPDATE_STATE_COMMITTED)


def test_a_dead_engine_is_not_confused_with_a_dead_sidecar(start: StartPair, caplog: pytest.LogCaptureFixture) -> None:
    pair = start()
    with clients(pair) as ranks:
        ranks[0].wait_ready(timeout=5)
        pair.engine.die()
        errors = on_all(ranks, send("no engine"))
        assert all(isinstance(error, EngineUnreachable) for error in errors), errors
        assert [client.unreleased_bytes for client in ranks] == [0, 0]
    pair.process.stop()
    with WeightSyncClient(pair.target, rank=0, tp_size=2) as client, caplog.at_level(logging.WARNING):
        with pytest.raises(SidecarUnreachable, match=f"the sidecar at {pair.target} cannot be reached"):
            send("no sidecar", timeout=2.0)(client)
        with pytest.raises(SidecarUnreachable, match="is it running"):
            client.wait_ready(timeout=0.3)
        assert client.unreleased_bytes == 0
    assert caplog.text == ""


def test_a_checkpoint_from_disk_heals_what_the_ranks_broke(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/end_weight_update", Fault.REFUSE, message="no")
    with clients(pair) as ranks:
        assert {type(error) for error in on_all(ranks, send("breaks"))} == {UpdateFailed}
        with pytest.raises(UpdateFailed, match="Failed to get weights iterator"):
            ranks[0].update_weights_from_disk(version="1", model_path=str(pair.folder / "missing"))
        result = ranks[0].update_weights_from_disk(version="1", model_path=str(pair.folder), timeout=TIMEOUT_S)
        assert (result.update_id, result.weight_version, result.num_posts) == ("disk 1", "1", 0)
        assert result.cache_flushed
        assert {"pause", "load", "flush", "publish", "resume"} <= set(result.phases)
        assert ranks[1].update_weights_from_disk(version="1", model_path=str(pair.folder)) == result
        with pytest.raises(UpdateRefused) as raised:
            ranks[0].update_weights_from_disk(version="1", model_path="/elsewhere")
        assert raised.value.reason == "UPDATE_ID_REUSED"
        with pytest.raises(ValueError, match="pause_mode 'gently' is none of retract, in_place, abort, drain, none"):
            ranks[0].update_weights_from_disk(version="2", pause_mode="gently")
        assert not [result for result in on_all(ranks, send("2")) if isinstance(result, Exception)]
    assert pair.engine.weight_version == "2"


@pytest.mark.parametrize(
    ("release", "verdicts"), [(SESSIONS, ["consistent", "consistent", "proven"]), (NO_SESSIONS, ["unavailable"] * 3)]
)
def test_what_verification_proved_is_in_the_result(start: StartPair, release: str, verdicts: list[str]) -> None:
    pair = start(release=release)
    seen = []
    with clients(pair) as ranks:
        for version, seed in enumerate([1, 2, 1]):
            first, second = on_all(ranks, send_verified(str(version), seed))
            assert isinstance(first, UpdateResult), first
            assert first == second
            assert ("verify" in first.phases, len(first.notes)) == (True, 0 if release == SESSIONS else 1)
            seen.append(first.verification)
    assert seen == verdicts


def test_without_verification_there_is_no_verdict_and_nothing_to_note(pair: Pair) -> None:
    with clients(pair) as ranks:
        for result in on_all(ranks, send("no verdict")):
            assert isinstance(result, UpdateResult), result
            assert (result.verification, result.notes, "verify" in result.phases) == ("", (), False)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"selector": "both"}, "selector 'both' is none of target, draft, all"),
        ({"pause_mode": "gently"}, "pause_mode 'gently' is none of"),
    ],
)
def test_a_choice_that_there_is_not_is_a_value_error(pair: Pair, choice: dict[str, str], said: str) -> None:
    with clients(pair) as (client, _):
        with pytest.raises(ValueError, match=said):
            client.update_weights(weights().items(), version="no choice", **choice)  # type: ignore[arg-type]
        assert client.unreleased_bytes == 0
    pair.assert_untouched()


def test_an_engine_that_is_too_busy_is_told_apart_and_the_memory_is_back(start: StartPair) -> None:
    pair = start("--pause-timeout", "0.5")
    pair.engine.running_requests = 1
    with clients(pair) as ranks:
        errors = on_all(
            ranks,
            lambda c: c.update_weights(weights().items(), version="busy", pause_mode="drain", timeout=TIMEOUT_S),
        )
        assert {(type(error), getattr(error, "reason", "")) for error in errors} == {(UpdateAborted, "ENGINE_BUSY")}
        assert [client.unreleased_bytes for client in ranks] == [0, 0]
    assert pair.status().state == pb.SIDECAR_STATE_READY


TRAINER = """
import sys, time, torch
from adapter import TensorSpec, WeightSyncClient

def tensors():
    yield "w0", torch.zeros(16)
    print("first bucket", flush=True)
    time.sleep(600)

specs = [TensorSpec(f"w{number}", torch.float32, (16,)) for number in range(2)]
client = WeightSyncClient(sys.argv[1], rank=0, tp_size=2, bucket_bytes=64)
client.update_weights(tensors(), version="killed", specs=specs)
"""


def test_a_trainer_that_is_killed_between_two_buckets_is_noticed_at_once(start: StartPair) -> None:
    """Not after the bucket time-out of 300 s, in which generation would be paused."""
    pair = start()
    pairs = [(f"w{number}", torch.zeros(16)) for number in range(2)]
    command = [sys.executable, "-c", TRAINER, pair.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer, clients(pair, bucket_bytes=64) as ranks:
        assert trainer.stdout is not None
        with ThreadPoolExecutor(1) as pool:
            try:
                assert trainer.stdout.readline() == b"first bucket\n"
                other = pool.submit(lambda: ranks[1].update_weights(pairs, version="killed", timeout=60))
                wait_until(lambda: LOAD in pair.posts())
            finally:
                trainer.send_signal(signal.SIGKILL)
            error = other.exception(timeout=TIMEOUT_S)
        assert isinstance(error, UpdateFailed), error
        assert "rank 0 cancelled its call, or died, before the engine had its memory" in str(error)
        assert not pair.engine.session_open
        assert ranks[1].unreleased_bytes == 0
    assert pair.status().state == pb.SIDECAR_STATE_DIRTY
