"""The drop-in on a mesh of two real ranks, with a real SGLang server with tp 2 that rank 0 starts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from adapter.demo.engine_http import EngineHttp
from tests.e2e.verl_ranks import (
    Belongings,
    Failure,
    VerlRank,
    belongings,
    call_all,
    engine_arguments,
    greedy,
    make_all,
    on_all,
    update_all,
    verl_ranks,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

GONE_S = 10.0


@dataclass(frozen=True, slots=True)
class OnMesh:
    """Two ranks with one engine."""

    ranks: list[VerlRank]
    described: list[dict[str, Any]]
    belongings: Belongings

    @property
    def http(self) -> EngineHttp:
        return EngineHttp(self.described[0]["server_url"])

    def tokens(self) -> list[int]:
        first, second = call_all(self.ranks, "generate", **greedy())
        assert first == second
        tokens: list[int] = first["output_ids"]
        return tokens


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnMesh]:
    folder = tmp_path_factory.mktemp("verl")
    with verl_ranks(folder) as ranks:
        described = make_all(ranks, engine_arguments(folder, 2))
        assert all(isinstance(answer, dict) for answer in described), described
        yield OnMesh(ranks, described, belongings(ranks[0], described[0]))


def test_every_rank_knows_the_engine_and_only_rank_0_has_started_it(on_mesh: OnMesh) -> None:
    first, second = on_mesh.described
    assert (first["tp_rank"], second["tp_rank"], first["tp_size"], second["tp_size"]) == (0, 1, 2, 2)
    same = ("server_url", "sidecar_target", "server_log", "sidecar_log")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert "The server is fired up" in Path(first["server_log"]).read_text()
    with pytest.raises(AssertionError, match="a server has at least"):
        belongings(on_mesh.ranks[1], second)


def test_rank_0_tells_how_long_it_waits_and_for_what(on_mesh: OnMesh) -> None:
    told = f"s (log: {on_mesh.described[0]['server_log']}"
    assert "weight-sync: waiting for the SGLang server, " in on_mesh.ranks[0].process.log_text()
    assert told in on_mesh.ranks[0].process.log_text()
    assert "weight-sync" not in on_mesh.ranks[1].process.log_text()


def test_updates_arrive_under_versions_that_count_up(on_mesh: OnMesh) -> None:
    results = [update_all(on_mesh.ranks, seed) for seed in (1, 2, 1)]
    versions = [int(first["weight_version"]) for first, _ in results]
    assert versions == list(range(versions[0], versions[0] + 3))
    assert all(first["weight_version"] == second["weight_version"] for first, second in results)
    assert on_mesh.http.weight_version() == str(versions[-1])


def test_the_tokens_follow_the_weights(on_mesh: OnMesh) -> None:
    tokens = []
    for seed in (1, 2, 1):
        update_all(on_mesh.ranks, seed, load_format="auto")
        tokens.append(on_mesh.tokens())
    assert tokens[0] == tokens[2] != tokens[1]


def test_a_version_of_the_callers_own_is_counted_on_from(on_mesh: OnMesh) -> None:
    assert update_all(on_mesh.ranks, 1, weight_version="500")[0]["weight_version"] == "500"
    assert update_all(on_mesh.ranks, 1)[1]["weight_version"] == "501"


def test_one_rank_alone_can_generate(on_mesh: OnMesh) -> None:
    tokens = on_mesh.tokens()
    for rank in on_mesh.ranks:
        assert rank.call("generate", **greedy(collective=False))["output_ids"] == tokens


def test_several_prompts_give_a_list_and_other_ranks_need_not_know_the_prompt(on_mesh: OnMesh) -> None:
    prompts = greedy(return_logprob=True, input_ids=[[1, 2], [3, 4, 5]])
    first, second = on_all(on_mesh.ranks, "generate", arguments=lambda rank: prompts if rank == 0 else {})
    assert first == second
    assert [len(answer["output_ids"]) for answer in first] == [8, 8]
    assert all(answer["meta_info"]["output_token_logprobs"] for answer in first)


def test_a_stream_reaches_all_ranks_in_step(on_mesh: OnMesh) -> None:
    whole = on_mesh.tokens()
    first, second = call_all(on_mesh.ranks, "generate", **greedy(stream=True))
    assert first == second
    assert len(first) > 2
    assert first[-1]["output_ids"] == whole
    alone = on_mesh.ranks[1].call("generate", **greedy(stream=True, collective=False))
    assert alone[-1]["output_ids"] == whole


def test_sglangs_refusal_reaches_all_ranks_in_its_own_words(on_mesh: OnMesh) -> None:
    first, second = call_all(on_mesh.ranks, "generate", input_ids=[1], sampling_params={"temperature": -1.0})
    assert first == second
    assert first.kind == "WeightSyncError"
    assert "answered 400 to /generate" in first.message
    assert "temperature must be a non-negative" in first.message


def test_a_callers_mistake_reaches_all_ranks(on_mesh: OnMesh) -> None:
    assert call_all(on_mesh.ranks, "generate") == [Failure("ValueError", "give either prompt or input_ids")] * 2


def test_a_paused_engine_holds_requests_until_it_goes_on(on_mesh: OnMesh) -> None:
    assert call_all(on_mesh.ranks, "pause_generation", mode="retract") == [None, None]
    for rank in on_mesh.ranks:
        rank.tell("generate", arguments=greedy())
    with requests.get(f"{on_mesh.described[0]['server_url']}/ready", timeout=10) as ready:
        assert ready.status_code == 503
    with requests.post(f"{on_mesh.described[0]['server_url']}/continue_generation", json={}, timeout=10) as answer:
        assert answer.ok
    first, second = (rank.hear(60) for rank in on_mesh.ranks)
    assert first["output_ids"] == second["output_ids"]


def test_control_may_be_called_by_all_ranks_or_by_rank_0_alone(on_mesh: OnMesh) -> None:
    assert on_mesh.ranks[0].call("pause_generation") is None
    assert call_all(on_mesh.ranks, "continue_generation") == [None, None]
    assert call_all(on_mesh.ranks, "flush_cache", timeout=5.0) == [None, None]
    assert call_all(on_mesh.ranks, "abort_request", abort_all=True) == [None, None]
    refused = on_mesh.ranks[0].call("abort_request")
    assert "an empty rid is the beginning of every one" in refused.message


def test_a_request_is_aborted_by_its_id(on_mesh: OnMesh) -> None:
    long = greedy(2000, stream=True, rid="a-long-one", collective=False)
    on_mesh.ranks[1].tell("generate", arguments=long)
    while not on_mesh.ranks[1]._commands.poll(0.3):
        assert on_mesh.ranks[0].call("abort_request", rid="a-long-one") is None
    chunks = on_mesh.ranks[1].hear(1)
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(chunks[-1]["output_ids"]) < 2000


def test_a_tensor_can_be_asked_for_as_far_as_sglang_shows_it(on_mesh: OnMesh) -> None:
    first, second = call_all(on_mesh.ranks, "get_weights_by_name", name="lm_head.weight", truncate_size=3)
    assert first == second
    assert "/get_weights_by_name" in first.message, "SGLang has no such method for this model"


def test_released_memory_is_neither_generated_with_nor_updated(on_mesh: OnMesh) -> None:
    assert call_all(on_mesh.ranks, "release_memory_occupation") == [None, None]
    assert call_all(on_mesh.ranks, "release_memory_occupation", tags=["weights"]) == [None, None]
    update = update_all(on_mesh.ranks, 1)
    generate = call_all(on_mesh.ranks, "generate", **greedy())
    assert {failure.kind for failure in (*update, *generate)} == {"ValueError"}
    assert call_all(on_mesh.ranks, "resume_memory_occupation", tags="weights") == [None, None]
    assert update_all(on_mesh.ranks, 1)[0]["num_posts"] == 1
    assert call_all(on_mesh.ranks, "resume_memory_occupation") == [None, None]
    assert call_all(on_mesh.ranks, "resume_memory_occupation") == [None, None], "nothing is released any more"
    assert len(on_mesh.tokens()) == 8
    told = on_mesh.ranks[0].process.log_text()
    assert told.count("release_memory_occupation frees nothing") == 1


def test_another_trainer_attaches_to_the_running_server_and_leaves_it_running(on_mesh: OnMesh) -> None:
    described = on_mesh.described[0]
    where = {"launch_server": False, "server_url": described["server_url"], "sidecar": described["sidecar_target"]}
    attached = on_all(on_mesh.ranks, "make", engine="other", arguments=where)
    assert [answer["server_log"] for answer in attached] == [None, None]
    version = int(on_mesh.http.weight_version())
    results = on_all(on_mesh.ranks, "update", engine="other", seed=2, arguments={})
    assert [int(result["weight_version"]) for result in results] == [version + 1] * 2
    assert on_all(on_mesh.ranks, "shutdown", engine="other", arguments={}) == [None, None]
    assert len(on_mesh.tokens()) == 8


def test_the_openai_routes_are_the_same_servers(on_mesh: OnMesh) -> None:
    with requests.get(f"{on_mesh.described[0]['server_url']}/v1/models", timeout=10) as answer:
        assert answer.json()["data"][0]["object"] == "model"


def test_a_shutdown_leaves_nothing_and_may_be_repeated(on_mesh: OnMesh) -> None:
    """Last in this file: it ends the engine."""
    assert on_mesh.belongings.left() != []
    assert call_all(on_mesh.ranks, "shutdown") == [None, None]
    assert on_mesh.belongings.wait_until_gone(0.0) == []
    assert call_all(on_mesh.ranks, "shutdown") == [None, None]
    assert call_all(on_mesh.ranks, "flush_cache") == [Failure("ValueError", "this engine was shut down")] * 2
