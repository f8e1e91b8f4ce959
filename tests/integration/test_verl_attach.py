"""A VerlEngine beside a sidecar and a scripted engine that run already: two ranks without a mesh, in one process."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from adapter.errors import LaunchError, SidecarUnreachable, UpdateAborted, WeightSyncError
from adapter.verl_engine import VerlEngine
from adapter.wire import UpdateResult
from tests.fakes import Fault, ScriptedEngine
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, Pair

WEIGHTS = [("model.embed.weight", torch.arange(8.0)), ("model.norm.weight", torch.ones(3))]
GREEDY: dict[str, Any] = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}


@contextmanager
def attached(pair: Pair, size: int = 2, **more: Any) -> Iterator[list[VerlEngine]]:
    """One per rank."""
    with ExitStack() as stack:

        def attach(rank: int) -> VerlEngine:
            where = {"server_url": pair.engine.url, "sidecar": pair.target, **more}
            return VerlEngine(launch_server=False, tp_rank=rank, tp_size=size, start_timeout=10.0, **where)

        engines = [attach(rank) for rank in range(size)]
        yield [stack.enter_context(engine) for engine in engines]


def update(engines: list[VerlEngine], **arguments: Any) -> list[UpdateResult]:
    with ThreadPoolExecutor(len(engines)) as pool:
        calls = [pool.submit(engine.update_weights_from_tensor, WEIGHTS, **arguments) for engine in engines]
        return [call.result(30) for call in calls]


def test_versions_count_on_from_what_the_sidecar_knows(start: StartPair) -> None:
    pair = start()
    with attached(pair) as engines:
        assert [result.weight_version for result in update(engines)] == ["1", "1"]
        assert update(engines, weight_version="a name")[0].weight_version == "a name"
        assert update(engines, weight_version=41)[0].weight_version == "41"
    with attached(pair) as engines:
        assert update(engines)[0].weight_version == "42"


def test_versions_count_on_though_the_engine_is_dirty(start: StartPair) -> None:
    pair = start()
    with attached(pair) as engines:
        update(engines, weight_version=7)
        pair.engine.fault(LOAD, Fault.REFUSE)
        with pytest.raises(WeightSyncError):
            update(engines)
    with attached(pair) as engines:
        assert update(engines)[0].weight_version == "9"


def test_the_cache_is_flushed_unless_told_not_to(start: StartPair) -> None:
    pair = start()
    with attached(pair) as engines:
        update(engines)
        assert pair.engine.posts("/flush_cache") == 1
        update(engines, flush_cache=False)
        assert pair.engine.posts("/flush_cache") == 1


@pytest.mark.parametrize("load_format", ["auto", "flattened_bucket"])
def test_load_formats_of_whole_tensors_are_the_same(start: StartPair, load_format: str) -> None:
    with attached(start()) as engines:
        assert update(engines, load_format=load_format)[0].num_posts == 1


@pytest.mark.parametrize(
    ("load_format", "says"), [("direct", "takes SGLang's own names"), ("my.loader", "not offered")]
)
def test_other_load_formats_are_refused_with_the_reason(start: StartPair, load_format: str, says: str) -> None:
    with attached(start()) as engines, pytest.raises(ValueError, match=says):
        engines[0].update_weights_from_tensor(WEIGHTS, load_format=load_format)


def test_memory_is_not_released_while_a_request_runs(start: StartPair) -> None:
    pair = start()
    with attached(pair) as engines:
        pair.engine.running_requests = 1
        with pytest.raises(WeightSyncError, match=r"requests still ran after 0\.5 s, and SGLang dies .* abort_request"):
            engines[0].release_memory_occupation(idle_timeout=0.5)
        assert pair.engine.posts("/release_memory_occupation") == 0
        pair.engine.running_requests = 0
        with pytest.raises(WeightSyncError, match="answered 404 to /release_memory_occupation"):
            engines[0].release_memory_occupation()  # the scripted engine has no such route


def test_a_rank_that_may_not_update_tells_the_others_at_once(start: StartPair) -> None:
    pair = start()
    with attached(pair) as engines, ThreadPoolExecutor(2) as pool:
        engines[1].release_memory_occupation()  # without a mesh, rank 1 alone believes that it is released
        pair.mark()
        waits, refused = (pool.submit(engine.update_weights_from_tensor, WEIGHTS) for engine in engines)
        with pytest.raises(ValueError, match="the engine's weights are released"):
            refused.result(10)
        with pytest.raises(UpdateAborted, match="the engine's weights are released"):
            waits.result(10)
        assert pair.posts() == []
        engines[1].resume_memory_occupation()
        assert {result.weight_version for result in update(engines)} == {"2"}


def test_control_does_nothing_on_other_ranks_than_0(start: StartPair) -> None:
    pair = start()
    with attached(pair) as engines:
        pair.mark()
        engines[1].release_memory_occupation()
        engines[1].pause_generation()
        engines[1].continue_generation()
        engines[1].flush_cache()
        engines[1].abort_request(abort_all=True)
        engines[1].resume_memory_occupation()
        assert pair.posts() == []
        engines[0].pause_generation("retract")
        engines[0].continue_generation()
        engines[0].abort_request("some-id")
        assert pair.posts() == ["/pause_generation", "/continue_generation", "/abort_request"]
        assert pair.bodies("/abort_request") == [{"rid": "some-id", "abort_all": False}]


@pytest.mark.parametrize("mode", ["", "stop"])
def test_an_unknown_pause_mode_is_refused(start: StartPair, mode: str) -> None:
    with attached(start()) as engines, pytest.raises(ValueError, match="is none of abort, retract, in_place"):
        engines[0].pause_generation(mode)


def test_generation_is_asked_of_the_server_by_any_rank(start: StartPair) -> None:
    with attached(start()) as engines:
        answers = [engine.generate(**GREEDY) for engine in engines]
        assert [len(answer["output_ids"]) for answer in answers] == [2, 2]


def test_a_refusal_comes_in_the_servers_words(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/generate", Fault.REFUSE, message="the prompt is too long")
    with attached(pair) as engines, pytest.raises(WeightSyncError, match=r"400 to /generate: the prompt is too long$"):
        engines[0].generate(**GREEDY)


def test_an_answer_that_does_not_come_ends_at_its_deadline(start: StartPair) -> None:
    pair = start()
    pair.engine.fault("/generate", Fault.HANG)
    with attached(pair) as engines:
        with pytest.raises(WeightSyncError, match=r"did not answer /generate within 0\.5 s"):
            engines[0].generate(**GREEDY, timeout=0.5)
        pair.engine.release()


def test_arguments_of_a_server_that_runs_already_are_said_to_have_no_effect(
    start: StartPair, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = start()
    with attached(pair, model_path="m", mem_fraction_static=0.5):
        said = capsys.readouterr().err
    assert f"{pair.engine.url} runs already" in said
    assert said.count("have no effect: model_path, mem_fraction_static") == 1, "rank 0 says it"


def test_another_number_of_ranks_than_the_engines_is_refused(start: StartPair) -> None:
    with pytest.raises(LaunchError, match="the SGLang server has tp_size 2, the trainer 1 ranks"), attached(start(), 1):
        pass


def test_an_engine_that_cannot_be_updated_is_refused_before_the_first_update(start: StartPair) -> None:
    pair = start(server_info={"pp_size": 2})
    with pytest.raises(LaunchError, match="this SGLang server cannot be updated: pipeline parallelism"), attached(pair):
        pass


def test_a_sidecar_that_is_not_there_is_named_when_the_time_is_over() -> None:
    with (
        ScriptedEngine(tp_size=1) as engine,
        pytest.raises(LaunchError, match="the sidecar at unix:/no/s was not ready"),
    ):
        VerlEngine(server_url=engine.url, sidecar="unix:/no/s", start_timeout=0.5)


def test_a_server_that_is_not_there_is_named_when_the_time_is_over() -> None:
    with pytest.raises(LaunchError, match=r"the SGLang server at http://127\.0\.0\.1:9 was not ready within 0\.5 s"):
        VerlEngine(server_url="http://127.0.0.1:9", sidecar="unix:/no/s", start_timeout=0.5)


def test_a_sidecar_that_has_gone_is_an_error_of_the_update(start: StartPair) -> None:
    pair = start()
    with attached(pair) as engines:
        pair.process.stop()
        with pytest.raises(SidecarUnreachable):
            engines[0].update_weights_from_tensor(WEIGHTS)


def test_after_a_shutdown_nothing_can_be_asked(start: StartPair) -> None:
    with attached(start()) as engines:
        engines[0].shutdown()
        engines[0].shutdown()
        for call in (engines[0].flush_cache, lambda: engines[0].generate(**GREEDY), lambda: update(engines[:1])):
            with pytest.raises(ValueError, match="this engine was shut down"):
                call()
