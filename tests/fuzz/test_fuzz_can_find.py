"""The fuzzing itself on trial: what it is there to find is planted, and found; a seed draws the same requests again."""

import asyncio
import base64
import json
import logging
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sidecar.manifest import BucketSpec, TensorSpec
from sidecar.memory import SharedMemory
from sidecar.payload import BucketPayload
from sidecar.servicer import WeightSyncServicer
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Call
from tests.fuzz import kept, safe_unpickler
from tests.fuzz.bodies import LOAD, BodyCheck
from tests.fuzz.calling import call
from tests.fuzz.payload_check import check_bucket
from tests.fuzz.scenarios import Request, Scenarios
from tests.fuzz.tally import Tally
from tests.fuzz.valid import Facts
from tests.fuzz.watching import LogWatch, LoopWatch, MemoryWatch
from tests.fuzz.world import KINDS, running

BUCKET = BucketSpec(64, (TensorSpec("w", "float32", (4,), 0, 16),))
PAYLOAD = BucketPayload(BUCKET).entry(SharedMemory("/manager", "/torch_fuzz_1", 64))
EMPTY = pb.GetStatusRequest().SerializeToString()


class Broken(WeightSyncServicer):
    """Has a defect."""

    async def GetStatus(self, *_: object) -> NoReturn:  # noqa: N802 - the proto names it
        raise ZeroDivisionError


def drawn(seed: int) -> list[Request]:
    facts = Facts(2, lambda rank, place: pb.MemoryHandle(loan=rank + place))
    waves = Scenarios(random.Random(seed), facts, "x").draw(2000)
    return [request for scenario in waves for wave in scenario for request in wave]


def test_a_seed_draws_the_same_requests_again() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_kept_request_reads_as_it_was_written(tmp_path: Path) -> None:
    request = Request("GetUpdate", b"\x00\xff" * 100)
    (tmp_path / "seeds.txt").write_text(kept.written("lora", request, "what # it did"))
    assert kept.read(tmp_path / "seeds.txt") == [kept.Kept("lora", request, "what # it did")]


async def test_a_handler_that_raises_is_found_in_its_answer_and_in_the_log(tmp_path: Path) -> None:
    with LogWatch() as log:
        async with running(KINDS[1], tmp_path, Broken) as world:
            answer = await call(world, Request("GetStatus", EMPTY))
            far = await call(world, Request("GetStatus", EMPTY, by_socket=True))
    assert "INTERNAL without details" in answer.finding
    assert "INTERNAL without details" in far.finding
    assert any("ZeroDivisionError" in finding for finding in log.findings)


async def test_a_loop_that_stands_still_and_an_unawaited_error_are_found() -> None:
    async with LoopWatch() as loop:
        asyncio.get_running_loop().call_exception_handler({"message": "lost", "exception": ValueError("x")})
        assert "ValueError" in loop.taken()[0]
        assert loop.longest_s < 1


def test_a_log_record_of_two_lines_or_a_traceback_is_found() -> None:
    with LogWatch() as log:
        logging.getLogger("sidecar.x").info("one\ntwo")
        logging.getLogger("sidecar.x").error("broke", exc_info=ValueError("y"))
        logging.getLogger("sidecar.x").info("good")
    assert len(log.findings) == 2


def test_memory_that_grows_is_found_and_memory_that_levels_off_is_not() -> None:
    grows, levels = MemoryWatch(), MemoryWatch()
    for place in range(40):
        for watch, rss in ((grows, 100 + 2 * place), (levels, min(150, 100 + 10 * place))):
            watch.rss_mb.append(float(rss))
            watch.objects.append(100_000)
    assert grows.findings()
    assert levels.findings() == []


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data + b"N.", id="something-after-the-end"),
        pytest.param(lambda data: data.replace(b"rebuild_storage_filename", b"fd_id" + b" " * 19), id="another-global"),
        pytest.param(lambda data: data.replace(b"ctypes\n", b"cos\n"), id="another-module"),
        pytest.param(lambda data: data.replace(b"J\x10\x00\x00\x00", b"J\x50\x00\x00\x00"), id="past-the-end"),
        pytest.param(lambda data: pickle.dumps({"flattened_tensor": 1}), id="not-ours"),
    ],
)
def test_a_payload_that_is_not_our_composers_is_found(spoil: Any) -> None:
    check_bucket(PAYLOAD)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever is raised, it is found
        check_bucket(spoil(PAYLOAD))


def posted(path: str, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Call:
    raw = json.dumps(body, separators=(",", ":")).encode()
    return Call("POST", path, {}, headers or {"host": "x"}, raw, 0.0)


def load(payloads: list[bytes], **more: object) -> Call:
    encoded = [base64.b64encode(payload).decode() for payload in payloads]
    body = {"serialized_named_tensors": encoded, "load_format": "flattened_bucket", "flush_cache": False}
    return posted(LOAD, body | more)


def test_a_body_that_the_sidecar_does_not_mean_is_found() -> None:
    check = BodyCheck(tp_size=2, by_rank=True, model_path="/m")
    check.check(load([PAYLOAD, PAYLOAD]))
    assert check.num_payloads == 2
    for bad in (
        load([PAYLOAD]),
        load([PAYLOAD, PAYLOAD], flush_cache=True),
        load([PAYLOAD, PAYLOAD], weight_version="nobody's"),
        load([PAYLOAD, PAYLOAD], load_format="direct"),
        posted("/update_weight_version", {"new_version": "nobody's", "abort_all_requests": False}),
        posted("/release_memory_occupation", {}),
        posted("/pause_generation", {"mode": "retract", "more": 1}),
        posted("/pause_generation", {"mode": "retract"}, headers={"x-injected": "1"}),
    ):
        with pytest.raises((AssertionError, KeyError)):
            check.check(bad)


def test_each_release_own_unpickler_refuses_what_it_must() -> None:
    harmful = b"\x80\x03cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    for unpickler in safe_unpickler.releases().values():
        with pytest.raises(RuntimeError, match="Blocked unsafe"):
            safe_unpickler._load(unpickler, harmful)


def test_tallies_of_two_processes_add_up() -> None:
    one = Tally()
    one.answered("GetStatus", "OK", 0.001)
    both = Tally.from_json(json.loads(json.dumps(one.to_json())))
    both.add(one)
    assert both.requests == {"GetStatus": 2}
    assert 0.0005 < both.percentile_s(0.99) < 0.002
    assert "2 requests" in both.table(1.0)
