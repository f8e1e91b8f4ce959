"""The scripted engine's own behaviour where no real server is asked: loading, dying, misbehaving."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from sidecar.manifest import BucketSpec, TensorSpec
from sidecar.memory import CudaIpcMemory, Memory, SharedMemory
from sidecar.payload import BucketPayload
from tests.fakes import ANY_PATH, Fault, ScriptedEngine, SharedFile
from tests.fakes.unpickling import CudaStorage, SharedStorage

UPDATE = "/update_weights_from_tensor"
BUCKET = BucketSpec(
    size_bytes=16,
    tensors=(
        TensorSpec(name="a", dtype="bfloat16", shape=(2, 2), byte_offset=0, size_bytes=8),
        TensorSpec(name="b", dtype="float32", shape=(2,), byte_offset=8, size_bytes=8),
    ),
)


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(tp_size=1) as engine:
        yield engine


@pytest.fixture
def buffer() -> Iterator[SharedFile]:
    with SharedFile(bytes(range(16))) as buffer:
        yield buffer


def in_host_memory(buffer: SharedFile) -> SharedMemory:
    return SharedMemory(manager_path=buffer.manager_path, name=buffer.name, size_bytes=buffer.size_bytes)


def on_gpu(uuid: str) -> CudaIpcMemory:
    return CudaIpcMemory(
        device_uuid=uuid,
        memory_handle=b"\x01c" + bytes(64),
        size_bytes=32,
        storage_offset_bytes=0,
        ref_counter_handle="/torch_1_2",
        ref_counter_offset=3,
        event_handle=bytes(64),
        event_sync_required=True,
    )


def entry(memory: Memory) -> str:
    return base64.b64encode(BucketPayload(BUCKET).entry(memory)).decode()


def post(engine: ScriptedEngine, path: str, **body: object) -> requests.Response:
    return requests.post(engine.url + path, json=body, timeout=10)


def update(engine: ScriptedEngine, *entries: str, **body: object) -> requests.Response:
    fields = {"load_format": "flattened_bucket", "flush_cache": False} | body
    return post(engine, UPDATE, serialized_named_tensors=list(entries), **fields)


def assert_dies(engine: ScriptedEngine, act: Callable[[], object]) -> None:
    with pytest.raises(requests.ConnectionError):
        act()
    assert not engine.alive
    with pytest.raises(requests.ConnectionError, match="refused"):
        requests.get(engine.url + "/model_info", timeout=10)


def test_it_decodes_what_the_sidecar_writes(engine: ScriptedEngine, buffer: SharedFile) -> None:
    post(engine, "/begin_weight_update")
    assert update(engine, entry(in_host_memory(buffer)), weight_version="7").json()["success"]
    (loaded,) = engine.calls[-1].entries
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in loaded.tensors] == [
        ("a", "bfloat16", (2, 2)),
        ("b", "float32", (2,)),
    ]
    assert loaded.storages() == {SharedStorage(buffer.manager_path, buffer.name, 16)}
    assert loaded.metadata[1]["start_idx"] == 8
    assert engine.weight_version == "7"


def test_it_keeps_gpu_handles_apart_by_rank() -> None:
    with ScriptedEngine(release="0.5.20", tp_size=2, device="cuda") as engine:
        assert update(engine, entry(on_gpu("first")), entry(on_gpu("second"))).status_code == 200
        storages = [storage for one in engine.calls[0].entries for storage in one.storages()]
        assert [storage.device for storage in storages if isinstance(storage, CudaStorage)] == ["first", "second"]


def test_equal_content_has_equal_digests_wherever_it_lies(buffer: SharedFile) -> None:
    with (
        ScriptedEngine(release="0.5.20") as engine,
        SharedFile(bytes(range(16))) as same,
        SharedFile(bytes(16)) as zeros,
    ):
        loaded = []
        for one in (buffer, same, zeros):
            assert update(engine, entry(in_host_memory(one))).status_code == 200
            loaded.append(engine.loaded)
    assert loaded[0] == loaded[1] != loaded[2]


def test_tokens_follow_the_weights(buffer: SharedFile) -> None:
    with ScriptedEngine(release="0.5.20") as engine:
        before = post(engine, "/generate", input_ids=[1]).json()["output_ids"]
        assert post(engine, "/generate", input_ids=[1]).json()["output_ids"] == before
        update(engine, entry(in_host_memory(buffer)))
        assert post(engine, "/generate", input_ids=[1]).json()["output_ids"] != before


def test_it_lets_go_of_shared_memory_as_torch_does(buffer: SharedFile) -> None:
    with ScriptedEngine(release="0.5.20") as engine:
        update(engine, entry(in_host_memory(buffer)))
        assert buffer.count == 1
        update(engine, entry(in_host_memory(buffer)))
        assert buffer.count == 0, "the exporter forgot to count its second importer, so the file is gone"
        assert_dies(engine, lambda: update(engine, entry(in_host_memory(buffer))))


@pytest.mark.parametrize(
    ("data", "body"),
    [
        pytest.param(b"no pickle", {}, id="not a pickle"),
        pytest.param(b"cos\nsystem\n(S'true'\ntR.", {}, id="a blocked global"),
        pytest.param(b"\x80\x03}.", {}, id="no bucket in it"),
        pytest.param(None, {"load_format": "unheard_of"}, id="an unknown load_format"),
        pytest.param(None, {"serialized_named_tensors": []}, id="a list that is too short"),
    ],
)
def test_a_payload_that_raises_kills_it(data: bytes | None, body: dict[str, object], buffer: SharedFile) -> None:
    payload = base64.b64encode(data).decode() if data else entry(in_host_memory(buffer))
    with ScriptedEngine(release="0.5.20") as engine:
        fields = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket", "flush_cache": False} | body
        assert_dies(engine, lambda: post(engine, UPDATE, **fields))


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(TensorSpec(name="x", dtype="float32", shape=(2,), byte_offset=2, size_bytes=8), id="misaligned"),
        pytest.param(
            TensorSpec(name="x", dtype="float32", shape=(2,), byte_offset=16, size_bytes=8), id="out of bounds"
        ),
        pytest.param(
            TensorSpec(name="x", dtype="float32", shape=(3,), byte_offset=0, size_bytes=8), id="a wrong shape"
        ),
    ],
)
def test_a_tensor_that_does_not_fit_kills_it(tensor: TensorSpec, buffer: SharedFile) -> None:
    payload = BucketPayload(BucketSpec(size_bytes=16, tensors=(tensor,))).entry(in_host_memory(buffer))
    with ScriptedEngine(release="0.5.20") as engine:
        assert_dies(engine, lambda: update(engine, base64.b64encode(payload).decode()))


def test_a_refused_flush_kills_up_to_0_5_21(buffer: SharedFile) -> None:
    with ScriptedEngine(release="0.5.21") as engine:
        post(engine, "/begin_weight_update")
        post(engine, "/pause_generation", mode="in_place")
        engine.running_requests = 1
        assert_dies(engine, lambda: update(engine, entry(in_host_memory(buffer)), flush_cache=True))


def test_a_refused_flush_is_a_400_with_the_weights_loaded_since_0_5_22(buffer: SharedFile) -> None:
    with ScriptedEngine(release="0.5.23") as engine:
        post(engine, "/begin_weight_update")
        post(engine, "/pause_generation", mode="in_place")
        engine.running_requests = 1
        before = engine.loaded
        reply = update(engine, entry(in_host_memory(buffer)), flush_cache=True, weight_version="1")
        assert (reply.status_code, engine.weight_version) == (400, "default")
        assert "Weights were updated, but the cache was not flushed" in reply.json()["message"]
        assert engine.loaded != before


def test_the_session_probe_kills_up_to_0_5_20() -> None:
    with ScriptedEngine(release="0.5.20") as engine:
        probe = {"names": [], "dtypes": [], "shapes": [], "group_name": "x"}
        assert_dies(engine, lambda: post(engine, "/update_weights_from_distributed", **probe))


def test_unknown_names_are_skipped_in_silence(buffer: SharedFile) -> None:
    with ScriptedEngine(release="0.5.20", known_names=["a"]) as engine:
        assert update(engine, entry(in_host_memory(buffer))).status_code == 200
        assert set(engine.loaded[0]) == {"model.embed_tokens.weight", "a"}


def test_half_a_load_ends_in_death_or_in_silence(buffer: SharedFile) -> None:
    with ScriptedEngine(release="0.5.20") as engine:
        engine.fault(UPDATE, Fault.SKIP_HALF)
        assert update(engine, entry(in_host_memory(buffer))).status_code == 200
        assert "b" not in engine.loaded[0]
        buffer.add_importers()
        engine.fault(UPDATE, Fault.HALF_LOAD)
        assert_dies(engine, lambda: update(engine, entry(in_host_memory(buffer))))


def test_a_lost_reply_was_carried_out_and_a_cut_call_was_not(engine: ScriptedEngine) -> None:
    engine.fault("/update_weight_version", Fault.CUT)
    engine.fault("/update_weight_version", Fault.LOSE_REPLY)
    for expected in ("default", "2"):
        with pytest.raises(requests.ConnectionError):
            post(engine, "/update_weight_version", new_version="2")
        assert engine.weight_version == expected
    assert post(engine, "/update_weight_version", new_version="3").status_code == 200


def test_a_refusal_touches_nothing(engine: ScriptedEngine) -> None:
    engine.fault("/begin_weight_update", Fault.REFUSE, message="not today")
    engine.fault("/flush_cache", Fault.REFUSE)
    reply = post(engine, "/begin_weight_update")
    assert (reply.status_code, reply.json()) == (400, {"success": False, "message": "not today"})
    assert not engine.session_open
    assert post(engine, "/flush_cache").text == "Flush cache failed.\n"


def test_a_hanging_load_holds_up_the_scheduler_but_not_model_info(engine: ScriptedEngine) -> None:
    engine.fault("/begin_weight_update", Fault.HANG)
    with ThreadPoolExecutor(max_workers=2) as pool:
        begin = pool.submit(post, engine, "/begin_weight_update")
        wait_until(lambda: engine.num_hanging == 1)
        info = pool.submit(requests.get, engine.url + "/server_info", timeout=10)
        assert requests.get(engine.url + "/model_info", timeout=10).status_code == 200
        assert not info.done()
        assert not engine.session_open
        engine.release()
        assert begin.result().status_code == info.result().status_code == 200
    assert engine.session_open


def test_a_late_answer_comes_after_the_deed(engine: ScriptedEngine) -> None:
    engine.fault("/begin_weight_update", Fault.LATE, delay_s=2.0)
    started = time.monotonic()
    with pytest.raises(requests.ReadTimeout):
        requests.post(engine.url + "/begin_weight_update", json={}, timeout=0.1)
    assert engine.session_open
    assert time.monotonic() - started < 2.0


def test_death_reaches_every_connection_and_a_restart_is_a_new_life(engine: ScriptedEngine) -> None:
    post(engine, "/pause_generation", mode="retract")
    seed, port = engine.random_seed, engine.port
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting = pool.submit(post, engine, "/generate", input_ids=[1])
        wait_until(lambda: engine.posts("/generate") == 1)
        engine.die()
        with pytest.raises(requests.ConnectionError):
            waiting.result()
    engine.restart()
    assert (engine.port, engine.paused, engine.session_open) == (port, False, False)
    assert engine.random_seed != seed
    assert requests.get(engine.url + "/model_info", timeout=10).json()["weight_version"] == "default"


def test_a_fault_on_any_path_counts_every_call(engine: ScriptedEngine) -> None:
    engine.fault(ANY_PATH, Fault.DIE_AFTER, after=2)
    post(engine, "/pause_generation")
    post(engine, "/continue_generation")
    assert_dies(engine, lambda: post(engine, "/begin_weight_update"))
    assert engine.paths() == ["/pause_generation", "/continue_generation", "/begin_weight_update"]


def test_an_unpaused_load_waits_for_requests_in_flight(engine: ScriptedEngine) -> None:
    engine.running_requests = 2
    with ThreadPoolExecutor(max_workers=1) as pool:
        begin = pool.submit(post, engine, "/begin_weight_update")
        wait_until(lambda: engine.posts("/begin_weight_update") == 1)
        assert not engine.session_open
        engine.running_requests = 0
        assert begin.result().status_code == 200


def test_requests_move_with_the_pause_mode(engine: ScriptedEngine) -> None:
    seen = []
    for mode in ("retract", "in_place", "abort"):
        engine.running_requests = 3
        post(engine, "/pause_generation", mode=mode)
        seen.append((engine.running_requests, engine.waiting_requests, engine.aborted_requests))
        post(engine, "/continue_generation")
    assert seen == [(0, 3, 0), (3, 0, 0), (0, 0, 3)]


def test_keys_guard_what_they_guard_in_sglang() -> None:
    with ScriptedEngine(api_key="user", admin_api_key="admin") as engine:
        as_user, as_admin = {"authorization": "Bearer user"}, {"authorization": "Bearer admin"}
        assert requests.get(engine.url + "/model_info", timeout=10).status_code == 401
        assert requests.get(engine.url + "/model_info", headers=as_user, timeout=10).status_code == 200
        assert requests.post(engine.url + "/flush_cache", headers=as_user, timeout=10).status_code == 401
        assert requests.post(engine.url + "/flush_cache", headers=as_admin, timeout=10).status_code == 200
        assert requests.get(engine.url + "/health", timeout=10).status_code == 200


def test_no_thread_survives_it() -> None:
    before = threading.active_count()
    with ScriptedEngine() as engine, requests.Session() as session:
        session.get(engine.url + "/model_info", timeout=10)
        engine.fault("/generate", Fault.HANG)
        with ThreadPoolExecutor(max_workers=1) as pool:
            hanging = pool.submit(post, engine, "/generate", input_ids=[1])
            wait_until(lambda: engine.num_hanging == 1)
            engine.close()
            assert isinstance(hanging.exception(), requests.ConnectionError)
    assert threading.active_count() == before


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)
