"""The scripted engine's torch.distributed groups: joining, what comes over one, leaving, and misbehaving meanwhile.

What real servers were asked as well is in ``tests/conformance/groups.py``.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.fakes import Fault, ScriptedEngine
from tests.fakes.groups import DESTROY, INIT, RECEIVE, broadcast_digest
from tests.unit.test_scripted_engine import assert_dies, post, wait_until

A, B = ("a", "bfloat16", [2, 2]), ("b", "float32", [2])


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(tp_size=2) as engine:
        yield engine


def join(engine: ScriptedEngine, name: str = "g", **body: object) -> requests.Response:
    place = {"master_address": "trainer", "master_port": 29500, "rank_offset": 1, "world_size": 3, "backend": "gloo"}
    return post(engine, INIT, **(place | {"group_name": name} | body))


def leave(engine: ScriptedEngine, name: str = "g") -> requests.Response:
    return post(engine, DESTROY, group_name=name)


def receive(engine: ScriptedEngine, *tensors: tuple[str, str, list[int]], **body: object) -> requests.Response:
    names, dtypes, shapes = ([tensor[part] for tensor in tensors] for part in range(3))
    fields = {"group_name": "g", "load_format": "flattened_bucket", "flush_cache": False} | body
    return post(engine, RECEIVE, names=names, dtypes=dtypes, shapes=shapes, **fields)


def ready_to_receive(engine: ScriptedEngine) -> None:
    assert join(engine).status_code == 200
    post(engine, "/begin_weight_update")


def refused(engine: ScriptedEngine) -> str:
    reply = receive(engine, ("byte", "uint8", [3]), ("x", "float32", [2]))
    assert reply.status_code == 400
    return str(reply.json()["message"])


def test_it_is_in_the_groups_that_it_joined_and_did_not_leave(engine: ScriptedEngine) -> None:
    for name in ("first", "second", "third"):
        assert join(engine, name).status_code == 200
    assert join(engine, "second").status_code == 400
    assert leave(engine, "first").status_code == 200
    assert leave(engine, "first").status_code == 400
    assert engine.groups == ["second", "third"]


def test_a_new_life_is_in_no_group(engine: ScriptedEngine) -> None:
    join(engine)
    engine.die()
    engine.restart()
    assert engine.groups == []
    assert leave(engine).status_code == 400


@pytest.mark.parametrize("release", ["0.5.15.post1", "0.5.23"])
def test_a_group_without_a_name_kills_it(release: str) -> None:
    with ScriptedEngine(release) as engine:
        assert_dies(engine, lambda: join(engine, ""))
        assert "Group name cannot be empty" in engine.cause_of_death


def test_nccl_needs_a_gpu() -> None:
    with ScriptedEngine(device="cuda") as on_gpu, ScriptedEngine(device="cpu") as on_cpu:
        assert join(on_gpu, backend="nccl").status_code == 200
        assert join(on_cpu, backend="nccl").status_code == 400
        assert on_cpu.groups == []


def test_a_rank_must_be_in_its_world(engine: ScriptedEngine) -> None:
    assert "rank < size. 3 vs 3" in join(engine, rank_offset=3).json()["message"]


def test_groups_wait_for_no_request_and_need_no_session(engine: ScriptedEngine) -> None:
    engine.running_requests = 1
    assert join(engine).status_code == 200
    assert leave(engine).status_code == 200


def test_every_rank_gets_the_same_and_its_digest_can_be_told(engine: ScriptedEngine) -> None:
    ready_to_receive(engine)
    assert receive(engine, A, B).json() == {"success": True, "message": "Succeeded to update parameter online."}
    first, second = engine.loaded
    assert first == second
    assert (first["a"], first["b"]) == (broadcast_digest("g", 1, *A), broadcast_digest("g", 1, *B))


def test_no_two_broadcasts_bring_the_same(engine: ScriptedEngine) -> None:
    ready_to_receive(engine)
    join(engine, "other")
    seen = []
    for name in ("g", "g", "other"):
        receive(engine, A, group_name=name)
        seen.append(engine.loaded[0]["a"])
    leave(engine)
    join(engine)
    receive(engine, A)
    seen.append(engine.loaded[0]["a"])
    assert len(set(seen)) == 4


def test_tokens_follow_what_was_received(engine: ScriptedEngine) -> None:
    ready_to_receive(engine)
    before = post(engine, "/generate", input_ids=[1]).json()["output_ids"]
    receive(engine, A)
    assert post(engine, "/generate", input_ids=[1]).json()["output_ids"] != before


def test_the_version_comes_with_the_bucket(engine: ScriptedEngine) -> None:
    ready_to_receive(engine)
    assert receive(engine, A, weight_version="7").json()["message"].endswith(" Weight version updated to 7.")
    assert engine.weight_version == "7"


def test_names_that_the_model_does_not_have_are_skipped_in_silence() -> None:
    with ScriptedEngine("0.5.20", known_names=["a"]) as engine:
        join(engine)
        assert receive(engine, A, B).status_code == 200
        assert set(engine.loaded[0]) == {"model.embed_tokens.weight", "a"}


@pytest.mark.parametrize(("release", "dies"), [("0.5.20", True), ("0.5.21", False), ("0.5.23", False)])
def test_an_unknown_group_kills_up_to_0_5_20(release: str, dies: bool) -> None:
    with ScriptedEngine(release) as engine:
        join(engine, "other")
        post(engine, "/begin_weight_update")
        if dies:
            assert_dies(engine, lambda: receive(engine, A))
            return
        reply = receive(engine, A)
        assert reply.status_code == 400
        assert reply.json()["message"].startswith("Failed to receive weights: Group g not in ['other'].")


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("0.5.20", "Failed to update parameter online: self.storage_offset() must be divisible by 4"),
        ("0.5.21", "Failed to receive weights: self.storage_offset() must be divisible by 4"),
        ("0.5.23", "Failed to receive weights: Unaligned received tensor x: byte offset 3, dtype torch.float32"),
    ],
)
def test_an_unaligned_bucket_is_noticed_before_the_broadcast_since_0_5_23(release: str, said: str) -> None:
    with ScriptedEngine(release) as engine:
        ready_to_receive(engine)
        before = engine.loaded
        assert refused(engine).startswith(said)
        assert engine.loaded == before
        assert receive(engine, A).status_code == 200
        number = 1 if release == "0.5.23" else 2
        assert engine.loaded[0]["a"] == broadcast_digest("g", number, *A)


def test_without_the_format_of_buckets_tensors_come_one_by_one(engine: ScriptedEngine) -> None:
    ready_to_receive(engine)
    assert receive(engine, ("byte", "uint8", [3]), B, load_format=None).status_code == 200
    assert receive(engine, load_format=None).status_code == 200
    assert receive(engine).status_code == 400


def test_a_refused_flush_is_fatal_up_to_0_5_21_and_a_400_later() -> None:
    for release in ("0.5.21", "0.5.23"):
        with ScriptedEngine(release) as engine:
            ready_to_receive(engine)
            post(engine, "/pause_generation", mode="in_place")
            engine.running_requests = 1
            if release == "0.5.21":
                assert_dies(engine, lambda: receive(engine, A, flush_cache=True))
                continue
            reply = receive(engine, A, flush_cache=True, weight_version="7")
            assert (reply.status_code, engine.weight_version) == (400, "default")
            assert "a" in engine.loaded[0]


def test_half_of_a_bucket_ends_in_death_or_in_silence(engine: ScriptedEngine) -> None:
    ready_to_receive(engine)
    engine.fault(RECEIVE, Fault.SKIP_HALF)
    assert receive(engine, A, B).status_code == 200
    assert "a" in engine.loaded[1]
    assert "b" not in engine.loaded[1]
    engine.fault(RECEIVE, Fault.HALF_LOAD)
    assert_dies(engine, lambda: receive(engine, A, B))


def test_a_refusal_touches_no_group(engine: ScriptedEngine) -> None:
    engine.fault(INIT, Fault.REFUSE, message="not today")
    assert join(engine).json() == {"success": False, "message": "not today"}
    assert engine.groups == []


def test_a_lost_reply_was_carried_out_and_a_cut_call_was_not(engine: ScriptedEngine) -> None:
    for path, act, groups in ((INIT, join, [[], ["g"]]), (DESTROY, leave, [["g"], []])):
        engine.fault(path, Fault.CUT)
        engine.fault(path, Fault.LOSE_REPLY)
        for expected in groups:
            with pytest.raises(requests.ConnectionError):
                act(engine)
            assert engine.groups == expected


def test_a_hanging_join_holds_up_the_scheduler(engine: ScriptedEngine) -> None:
    engine.fault(INIT, Fault.HANG)
    with ThreadPoolExecutor(max_workers=2) as pool:
        joining = pool.submit(join, engine)
        wait_until(lambda: engine.num_hanging == 1)
        info = pool.submit(requests.get, engine.url + "/server_info", timeout=10)
        assert requests.get(engine.url + "/model_info", timeout=10).status_code == 200
        assert not info.done()
        assert engine.groups == []
        engine.release()
        assert joining.result().status_code == info.result().status_code == 200
    assert engine.groups == ["g"]


def test_a_late_bucket_is_loaded_before_it_is_answered(engine: ScriptedEngine) -> None:
    ready_to_receive(engine)
    engine.fault(RECEIVE, Fault.LATE, delay_s=0.2)
    with ThreadPoolExecutor(max_workers=1) as pool:
        loading = pool.submit(receive, engine, A)
        wait_until(lambda: "a" in engine.loaded[0])
        assert not loading.done()
        assert loading.result().status_code == 200


@pytest.mark.parametrize("fault", [Fault.DIE, Fault.DIE_AFTER])
@pytest.mark.parametrize(
    ("path", "act"), [(INIT, lambda engine: join(engine, "h")), (DESTROY, leave), (RECEIVE, receive)]
)
def test_it_can_die_of_any_of_these_calls(
    path: str, act: Callable[[ScriptedEngine], object], fault: Fault, engine: ScriptedEngine
) -> None:
    ready_to_receive(engine)
    engine.fault(path, fault)
    assert_dies(engine, lambda: act(engine))
