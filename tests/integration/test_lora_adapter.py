"""A LoRA adapter sent alone: a sidecar process beside a scripted engine, real shared memory, one client per rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import grpc
import pytest
import requests
import torch
from safetensors.torch import save_file

from adapter import (
    EngineUnreachable,
    RanksMissing,
    UpdateAborted,
    UpdateRefused,
    UpdateStillApplying,
    WeightSyncClient,
    WeightSyncError,
)
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault
from tests.fakes.lora import LOAD, UNLOAD
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, Pair, wait_until

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
MODULE = "base_model.model.model.layers.0.self_attn.o_proj"
LORA = {"enable_lora": True, "max_lora_rank": 8}
TIMEOUT_S = 20.0


def factors(seed: int = 0, r: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{MODULE}.lora_A.weight": torch.randn(r, 8, generator=generator),
        f"{MODULE}.lora_B.weight": torch.randn(6, r, generator=generator).to(torch.bfloat16),
    }


def send(client: WeightSyncClient, seed: int = 0, **options: object) -> tuple[str, ...]:
    options = {"timeout": TIMEOUT_S} | options
    return client.load_lora_adapter("tuned", factors(seed).items(), CONFIG, **options)  # type: ignore[arg-type]


def on_all(ranks: list[WeightSyncClient], call: Callable[[WeightSyncClient], object]) -> list[object]:
    """Every rank at once; its result, or what it raised."""

    def guarded(client: WeightSyncClient) -> object:
        try:
            return call(client)
        except WeightSyncError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(guarded, ranks))


@contextmanager
def clients(pair: Pair, tp_size: int = 2) -> Iterator[list[WeightSyncClient]]:
    """One per rank; nothing of theirs, and no adapter, may be left over."""
    ranks = [WeightSyncClient(pair.target, rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    try:
        yield ranks
        pair.engine.forget_faults()
        if pair.engine.alive:
            for name in pair.engine.adapters:
                assert ranks[0].unload_lora_adapter(name)
        assert [client.unreleased_bytes for client in ranks] == [0] * tp_size
    finally:
        for client in ranks:
            client.close()


def answer(pair: Pair, name: str | None, num_tokens: int = 4) -> requests.Response:
    body = {"input_ids": [1, 2, 3], "lora_path": name, "sampling_params": {"max_new_tokens": num_tokens}}
    return requests.post(f"{pair.engine.url}/generate", json=body, timeout=TIMEOUT_S)


def tokens(pair: Pair, name: str | None) -> list[int]:
    reply = answer(pair, name)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["output_ids"])


def exists(pair: Pair, update_id: str) -> bool:
    """Whether a load of that id is in hand, or was."""
    try:
        pair.outcome(update_id)
    except grpc.RpcError:
        return False
    return True


@pytest.mark.parametrize("release", ["0.5.20", "0.5.23"])
def test_every_rank_sends_and_requests_can_name_the_adapter(start: StartPair, release: str) -> None:
    pair = start(release=release, server_info=LORA)
    plain = tokens(pair, None)
    with clients(pair) as ranks:
        assert on_all(ranks, send) == [("tuned",), ("tuned",)]
        assert tokens(pair, "tuned") != plain
        assert tokens(pair, None) == plain
        assert pair.posts().count(LOAD) == 1
        assert set(pair.posts()) == {"/generate", LOAD}, "nothing is paused and no version is set"
        (body,) = pair.bodies(LOAD)
        assert len(body["serialized_named_tensors"]) == 2
        assert body["config_dict"] == CONFIG
        assert pair.status().weight_version == "default"


def test_before_0_5_17_one_payload_goes_to_the_one_rank(start: StartPair) -> None:
    pair = start(release="0.5.15.post1", tp_size=1, server_info=LORA)
    with clients(pair, tp_size=1) as ranks:
        assert on_all(ranks, send) == [("tuned",)]
        assert tokens(pair, "tuned") != tokens(pair, None)
        (body,) = pair.bodies(LOAD)
        assert isinstance(body["serialized_tensors"], str)


def test_before_0_5_17_several_ranks_are_refused_with_the_reason(start: StartPair) -> None:
    pair = start(release="0.5.15.post1", tp_size=2, server_info=LORA)
    with clients(pair) as ranks:
        for error in on_all(ranks, send):
            assert isinstance(error, UpdateRefused)
            assert "0.5.17 or later" in str(error)
    pair.assert_untouched()


def test_an_engine_without_lora_is_refused_by_name(start: StartPair) -> None:
    pair = start(tp_size=1)
    with clients(pair, tp_size=1) as ranks:
        with pytest.raises(UpdateRefused, match="--enable-lora"):
            send(ranks[0])
        with pytest.raises(UpdateRefused, match="--enable-lora"):
            ranks[0].unload_lora_adapter("tuned")
    pair.assert_untouched()


def test_the_same_name_again_is_followed_and_its_old_memory_let_go(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    with clients(pair, tp_size=1) as (client,):
        send(client, seed=1)
        first = tokens(pair, "tuned")
        send(client, seed=2)
        assert tokens(pair, "tuned") != first
        send(client, seed=1)
        assert tokens(pair, "tuned") == first
        assert pair.posts().count(UNLOAD) == 2


def test_without_replace_a_name_that_is_taken_is_refused_before_anything_is_posted(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    with clients(pair, tp_size=1) as (client,):
        send(client)
        with pytest.raises(UpdateRefused, match="loaded already"):
            send(client, seed=2, replace=False)
        assert pair.posts().count(LOAD) == 1


def test_replacing_waits_for_the_requests_that_use_the_old_one(start: StartPair) -> None:
    pair = start(tp_size=1, token_s=0.05, server_info=LORA)
    with clients(pair, tp_size=1) as (client,), ThreadPoolExecutor(1) as pool:
        send(client, seed=1)
        running = pool.submit(answer, pair, "tuned", 20)
        wait_until(lambda: pair.engine.running_requests == 1)
        send(client, seed=2)
        assert pair.engine.running_requests == 0
        assert running.result().status_code == 200


def test_an_unload_that_outlasts_its_time_is_awaited_before_the_next_load(start: StartPair) -> None:
    pair = start("--pause-timeout", "0.5", tp_size=1, token_s=0.05, server_info=LORA)
    with clients(pair, tp_size=1) as (client,), ThreadPoolExecutor(1) as pool:
        send(client, seed=1)
        running = pool.submit(answer, pair, "tuned", 60)
        wait_until(lambda: pair.engine.running_requests == 1)
        for _ in range(2):  # the name is free already, but a load would wait behind the unload
            with pytest.raises(UpdateAborted, match=r"still ran after 0\.5 s"):
                send(client, seed=2)
        assert pair.posts().count(LOAD) == 1
        assert client.unreleased_bytes == 0, "memory that was never posted is taken back"
        running.result()
        send(client, seed=2)


def test_a_missing_rank_is_named_and_nothing_is_posted(start: StartPair) -> None:
    pair = start(server_info=LORA)
    with clients(pair) as (first, second):
        with pytest.raises(RanksMissing, match="rank 1 to arrive"):
            send(first, timeout=2.5)
        with pytest.raises(RanksMissing):  # it comes late, and is told
            send(second)
        pair.assert_untouched()
        assert on_all([first, second], send) == [("tuned",), ("tuned",)]


def test_a_rank_that_gives_up_is_told_to_the_others_at_once(start: StartPair) -> None:
    pair = start(server_info=LORA)

    with clients(pair) as (first, _):
        give_up = pb.LoadLoraAdapterRequest(
            update_id="lora tuned", rank=1, tp_size=2, lora_name="tuned", give_up="out of memory"
        )
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(send, first)
            wait_until(lambda: exists(pair, "lora tuned"))
            pair.rpc.LoadLoraAdapter(give_up, timeout=ANSWER_S)
            with pytest.raises(UpdateAborted, match=r"rank 1 aborted .* out of memory"):
                waiting.result()
        assert first.unreleased_bytes == 0
        pair.rpc.LoadLoraAdapter(give_up, timeout=ANSWER_S)  # before the other one has come
        with pytest.raises(UpdateAborted, match="out of memory"):
            send(first)
    pair.assert_untouched()


def test_shapes_are_compared_with_the_checkpoint_where_it_can_be_read(start: StartPair, tmp_path: Path) -> None:
    weight = "model.layers.0.self_attn.o_proj.weight"
    save_file({weight: torch.zeros(6, 9)}, tmp_path / "model.safetensors")
    pair = start(tp_size=1, server_info={**LORA, "model_path": str(tmp_path)})
    with clients(pair, tp_size=1) as (client,):
        with pytest.raises(UpdateRefused, match=r"is for \[6, 8\], but the model's weight is \[6, 9\]"):
            send(client)
        pair.assert_untouched()
        save_file({weight: torch.zeros(6, 8)}, tmp_path / "model.safetensors")
        assert send(client) == ("tuned",)
        assert not pair.outcome("lora tuned").notes


def test_what_sglang_refuses_is_said_in_its_words_with_what_became_of_the_name(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    with clients(pair, tp_size=1) as (client,):
        send(client)
        pair.engine.fault(LOAD, Fault.REFUSE, message="no room in the memory pool")
        with pytest.raises(
            UpdateRefused, match=r"no room in the memory pool.* is unloaded, so requests cannot name it"
        ):
            send(client, seed=2)
        assert pair.engine.adapters == []
        assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_lost_answer_is_looked_into(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    with clients(pair, tp_size=1) as (client,):
        pair.engine.fault(LOAD, Fault.LOSE_REPLY)
        assert send(client) == ("tuned",)
        assert "answer to the load was lost" in " ".join(pair.outcome("lora tuned").notes)
        assert pair.posts().count(LOAD) == 1
        assert pair.status().state == pb.SIDECAR_STATE_READY


def test_a_load_that_never_arrived_is_not_sent_again_and_its_memory_is_kept(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    client = WeightSyncClient(pair.target, rank=0, tp_size=1)
    pair.engine.fault(LOAD, Fault.CUT)
    with pytest.raises(UpdateAborted, match="unload it and load it again"):
        send(client)
    assert pair.posts().count(LOAD) == 1
    assert client.unreleased_bytes > 0, "the engine may open it still"
    assert pair.status().state == pb.SIDECAR_STATE_READY
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    pair.engine.restart()
    wait_until(lambda: pair.status().HasField("engine"))
    client.close()
    assert client.unreleased_bytes == 0, "it has died with its engine"


def test_an_engine_that_dies_of_a_load_is_not_dirty(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    with clients(pair, tp_size=1) as (client,):
        pair.engine.fault(LOAD, Fault.DIE)
        with pytest.raises((UpdateAborted, EngineUnreachable)):
            send(client)
        wait_until(lambda: not pair.status().HasField("engine"))
        pair.engine.restart()
        pair.wait_for(pb.SIDECAR_STATE_UNSYNCED)
        assert send(client) == ("tuned",)


def test_a_deadline_while_the_engine_loads_stops_nothing(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    with clients(pair, tp_size=1) as (client,):
        pair.engine.fault(LOAD, Fault.HANG)
        with pytest.raises(UpdateStillApplying):
            send(client, timeout=2.5)
        assert client.unreleased_bytes > 0
        pair.engine.release()
        wait_until(lambda: pair.engine.adapters == ["tuned"])
        assert client.unload_lora_adapter("tuned")


def test_unloading_what_is_not_there_is_no_error_and_all_ranks_may_ask(start: StartPair) -> None:
    pair = start(server_info=LORA)
    with clients(pair) as ranks:
        on_all(ranks, send)
        answers = on_all(ranks, lambda client: client.unload_lora_adapter("tuned"))
        assert True in answers
        assert not ranks[0].unload_lora_adapter("tuned")
        assert pair.engine.adapters == []


class PeftType(StrEnum):
    LORA = "LORA"


class LikeLoraConfig:
    """As peft's: sets and enums, and values that JSON has no form for."""

    def to_dict(self) -> dict[str, object]:
        return {**CONFIG, "peft_type": PeftType.LORA, "target_modules": {"o_proj"}, "runtime": object()}


def test_a_config_object_is_taken_as_it_is(start: StartPair) -> None:
    pair = start(tp_size=1, server_info=LORA)
    config = LikeLoraConfig()
    with clients(pair, tp_size=1) as (client,):
        assert client.load_lora_adapter("tuned", factors().items(), config) == ("tuned",)
        with pytest.raises(ValueError, match="config must be"):
            client.load_lora_adapter("tuned", factors().items(), object())  # type: ignore[arg-type]
