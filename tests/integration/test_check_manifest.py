"""What would be wrong with a manifest: as a dry run, and as the reason why an update is refused."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import grpc
import pytest
import torch

from adapter import UpdateRefused, WeightSyncClient
from adapter.demo import tiny_model
from adapter.planner import TensorSpec
from sidecar import manifest_store
from sidecar.config import Timeouts
from sidecar.coordinator import Coordinator
from sidecar.engine.groups import GroupEngine
from sidecar.errors import Draining, EngineRestarted
from sidecar.header import Header
from sidecar.manifest import BucketSpec, Manifest
from sidecar.manifest import TensorSpec as SidecarTensor
from sidecar.memory import Memory, SharedMemory
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault, ScriptedEngine, SharedFile
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, LOAD, Pair, manifest, refusal, wait_until

SHAPES = dict(tiny_model.tensor_shapes())
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
DTYPE = torch.bfloat16
TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_model.random_weights(1))


@pytest.fixture(scope="module")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """An engine with one rank that was started with the tiny model's checkpoint."""
    engine = ScriptedEngine(tp_size=1, server_info={"model_path": str(checkpoint)})
    with engine, closing(Pair(engine, tmp_path_factory.mktemp("pair"))) as pair:
        pair.wait_for(pb.SIDECAR_STATE_READY)
        yield pair


@pytest.fixture
def pair_of_tiny(tiny: Pair) -> Iterator[Pair]:
    tiny.wait_for(pb.SIDECAR_STATE_READY)
    tiny.mark()
    yield tiny
    tiny.engine.release()
    tiny.forget_memory()


@pytest.fixture
def client(pair_of_tiny: Pair) -> Iterator[WeightSyncClient]:
    with WeightSyncClient(pair_of_tiny.target, rank=0, tp_size=1) as client:
        yield client
        assert client.unreleased_bytes == 0


def specs(*, without: Sequence[str] = (), **changed: tuple[int, ...] | torch.dtype) -> list[TensorSpec]:
    """The tiny model's tensors; ``changed`` by name (with __ for a dot) in shape or dtype, or added."""
    tensors = {name: (shape, DTYPE) for name, shape in SHAPES.items() if name not in without}
    for key, change in changed.items():
        name = key.replace("__", ".")
        shape, dtype = tensors.get(name, ((4,), DTYPE))
        tensors[name] = (shape, change) if isinstance(change, torch.dtype) else (change, dtype)
    return [TensorSpec(name, dtype, shape) for name, (shape, dtype) in tensors.items()]


def tensors_of(which: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    return [(spec.name, torch.zeros(spec.shape, dtype=spec.dtype)) for spec in which]


def found(response: pb.CheckManifestResponse) -> list[tuple[str, list[str], str]]:
    """Kind, tensors and severity of every finding."""
    return [
        (one.kind, list(one.tensors), pb.Severity.Name(one.severity).removeprefix("SEVERITY_").lower())
        for one in response.findings
    ]


def check(pair: Pair, what: pb.Manifest, **allow: Sequence[str]) -> pb.CheckManifestResponse:
    request = pb.CheckManifestRequest(manifest=pb.ManifestReference(manifest=what), allow=pb.ManifestAllowance(**allow))
    return pair.rpc.CheckManifest(request, timeout=ANSWER_S)


# The dry run.


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 16, 1 << 30])
def test_the_models_own_tensors_have_no_finding_and_nothing_is_left_unchecked(
    pair_of_tiny: Pair, checkpoint: Path, bucket_bytes: int
) -> None:
    with WeightSyncClient(pair_of_tiny.target, rank=0, tp_size=1, bucket_bytes=bucket_bytes) as client:
        answer = client.check_manifest(specs())
    assert (list(answer.findings), list(answer.unchecked)) == ([], [])
    assert list(answer.sources) == [f"checkpoint {checkpoint}"]
    assert len(answer.manifest_digest) == 64
    pair_of_tiny.assert_untouched()


@pytest.mark.parametrize(
    ("which", "finding"),
    [
        (specs(model__extra__weight=(4,)), ("UNKNOWN_TENSOR", ["model.extra.weight"], "error")),
        (specs(without=[NORM]), ("MISSING_TENSOR", [NORM], "error")),
        (specs(model__norm__weight=(64,)), ("SHAPE_MISMATCH", [NORM], "error")),
        (specs(model__norm__weight=torch.float32), ("DTYPE_DIFFERS", [NORM], "warning")),
    ],
    ids=["unknown", "missing", "shape", "dtype"],
)
def test_what_is_wrong_is_found_without_touching_anything(
    pair_of_tiny: Pair, client: WeightSyncClient, which: list[TensorSpec], finding: tuple[str, list[str], str]
) -> None:
    answer = client.check_manifest(which)
    assert found(answer) == [finding]
    assert finding[1][0] in answer.findings[0].message
    pair_of_tiny.assert_untouched()


def test_what_is_allowed_by_name_or_pattern_is_no_finding(pair_of_tiny: Pair, client: WeightSyncClient) -> None:
    which = specs(without=[NORM, HEAD], model__extra__weight=(4,))
    assert {kind for kind, _, _ in found(client.check_manifest(which))} == {"UNKNOWN_TENSOR", "MISSING_TENSOR"}
    answer = client.check_manifest(which, allow_unknown=["model.extra.*"], allow_missing=[NORM, "lm_head.?eight"])
    assert found(answer) == []
    pair_of_tiny.assert_untouched()


def test_a_digest_stands_for_its_manifest(pair_of_tiny: Pair) -> None:
    first = check(pair_of_tiny, manifest())
    request = pb.CheckManifestRequest(manifest=pb.ManifestReference(digest=first.manifest_digest))
    assert pair_of_tiny.rpc.CheckManifest(request, timeout=ANSWER_S) == first
    request.manifest.digest = "0" * 64
    refused = refusal(pair_of_tiny.rpc.CheckManifest.future(request, timeout=ANSWER_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "MANIFEST_UNKNOWN")
    pair_of_tiny.assert_untouched()


def test_a_manifest_that_no_engine_could_take_is_an_error_of_the_call(pair_of_tiny: Pair) -> None:
    twice = pb.Manifest(buckets=[manifest().buckets[0]] * 2)
    for wrong, reason in ((twice, "INVALID_TENSOR"), (pb.Manifest(), "EMPTY_UPDATE")):
        request = pb.CheckManifestRequest(manifest=pb.ManifestReference(manifest=wrong))
        refused = refusal(pair_of_tiny.rpc.CheckManifest.future(request, timeout=ANSWER_S))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    empty = refusal(pair_of_tiny.rpc.CheckManifest.future(pb.CheckManifestRequest(), timeout=ANSWER_S))
    assert empty.reason == "EMPTY_UPDATE"


def test_a_dry_run_does_not_wait_for_the_update_in_hand(pair_of_tiny: Pair, client: WeightSyncClient) -> None:
    pair_of_tiny.engine.fault(LOAD, Fault.HANG)
    request = pair_of_tiny.request("in hand", tp_size=1)
    request.update.allow.unknown.append("layer.*")
    request.update.allow.missing.append("*")
    loading = pair_of_tiny.send(request)
    wait_until(lambda: pair_of_tiny.engine.num_hanging == 1)
    assert found(client.check_manifest(specs())) == []
    pair_of_tiny.engine.release()
    assert loading.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_an_engine_that_is_not_there_has_no_model_to_compare_with(start: StartPair) -> None:
    pair = start()
    pair.engine.die()
    wait_until(lambda: not pair.status().HasField("engine"))
    request = pb.CheckManifestRequest(manifest=pb.ManifestReference(manifest=manifest()))
    refused = refusal(pair.rpc.CheckManifest.future(request, timeout=ANSWER_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNREACHABLE")


# Updates.


@pytest.mark.parametrize("bucket_bytes", [1 << 16, 1 << 30], ids=["bucketed", "one-call"])
@pytest.mark.parametrize(
    ("which", "said"),
    [
        (specs(model__extra__weight=(4,)), "'model.extra.weight'"),
        (specs(without=[NORM]), f"'{NORM}'"),
        (specs(model__norm__weight=(64,)), "expected as [128] and sent as [64]"),
    ],
    ids=["unknown", "missing", "shape"],
)
def test_an_update_that_does_not_fit_is_refused_with_the_engine_untouched(
    pair_of_tiny: Pair, checkpoint: Path, which: list[TensorSpec], said: str, bucket_bytes: int
) -> None:
    with WeightSyncClient(pair_of_tiny.target, rank=0, tp_size=1, bucket_bytes=bucket_bytes) as client:
        with pytest.raises(UpdateRefused) as raised:
            client.update_weights(tensors_of(which), version="does not fit", timeout=TIMEOUT_S)
        assert client.unreleased_bytes == 0
    assert raised.value.reason == "MANIFEST_MISMATCH"
    message = str(raised.value)
    assert message.startswith(f"rank 0: the manifest does not fit the model (checkpoint {checkpoint}): 1 tensor ")
    assert said in message
    assert "the engine was not touched" in message
    pair_of_tiny.assert_untouched()


def test_what_is_allowed_is_loaded_and_what_a_person_should_know_is_a_note(
    pair_of_tiny: Pair, client: WeightSyncClient
) -> None:
    which = specs(without=[HEAD], model__extra__weight=(4,), model__norm__weight=torch.float32)
    result = client.update_weights(
        tensors_of(which),
        version="allowed",
        allow_unknown=["model.extra.weight"],
        allow_missing=["lm_head.*"],
        timeout=TIMEOUT_S,
    )
    (note,) = result.notes
    assert note.startswith("1 tensor is of another dtype than in checkpoint")
    assert f"'{NORM}', is expected as bfloat16 and sent as float32" in note
    assert pair_of_tiny.engine.weight_version == "allowed"


def test_the_models_own_tensors_are_loaded_without_a_word(pair_of_tiny: Pair, client: WeightSyncClient) -> None:
    result = client.update_weights(tiny_model.random_weights(2), version="its own", timeout=TIMEOUT_S)
    assert result.notes == ()


def test_ranks_that_allow_different_things_differ(pair: Pair) -> None:
    requests = [pair.request("allow", rank) for rank in range(2)]
    requests[0].update.allow.unknown.extend(["a", "b"])
    requests[1].update.allow.unknown.extend(["b", "c"])
    waiting = pair.send(requests[0])
    pair.wait_for(pb.SIDECAR_STATE_COLLECTING)
    for refused in (refusal(pair.send(requests[1])), refusal(waiting)):
        assert (refused.reason, "allow" in refused.message) == ("RANKS_DIFFER", True)
    pair.assert_untouched()


def test_ranks_that_allow_the_same_in_another_order_agree(pair: Pair) -> None:
    requests = [pair.request("same allowance", rank) for rank in range(2)]
    requests[0].update.allow.unknown.extend(["a", "b"])
    requests[1].update.allow.unknown.extend(["b", "a"])
    for answer in [pair.send(request) for request in requests]:
        assert answer.result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_repeated_call_is_answered_whatever_its_checkpoint_has_become(start: StartPair, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model.save_checkpoint(folder, [("layer.0.weight", torch.zeros(2, 3)), ("layer.0.bias", torch.zeros(4))])
    pair = start(tp_size=1, server_info={"model_path": str(folder)})
    request = pair.request("repeated", tp_size=1)
    first = pair.send(request).result(ANSWER_S)
    tiny_model.save_checkpoint(folder, [("something.else", torch.zeros(2, 3))])
    assert pair.send(request).result(ANSWER_S) == first


def test_what_an_engine_has_loaded_it_can_load_again_whatever_its_checkpoint_has_become(
    start: StartPair, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_model.save_checkpoint(folder, [("layer.0.weight", torch.zeros(2, 3)), ("layer.0.bias", torch.zeros(4))])
    pair = start(tp_size=1, server_info={"model_path": str(folder)})
    pair.update("first", tp_size=1)
    tiny_model.save_checkpoint(folder, [("something.else", torch.zeros(2, 3))])
    assert pair.update("again", tp_size=1).state == pb.UPDATE_STATE_COMMITTED
    other = pair.request("other", tp_size=1, num_buckets=2)
    assert refusal(pair.send(other)).reason == "MANIFEST_MISMATCH"


# Without a checkpoint.


def test_the_last_verified_update_is_what_a_manifest_is_compared_with(start: StartPair) -> None:
    pair = start(tp_size=1)
    nothing = check(pair, manifest(2))
    assert (list(nothing.findings), list(nothing.sources)) == ([], [])
    assert "there is neither a readable checkpoint nor an earlier verified update" in nothing.unchecked[0]
    assert "'/models/tiny-qwen3' is not the absolute path of a folder on this host" in nothing.unchecked[-1]
    pair.update("not verified", tp_size=1, num_buckets=2)
    assert list(check(pair, manifest(2)).sources) == []
    request = pair.request("verified", tp_size=1, num_buckets=2)
    request.update.verify = True
    assert pair.send(request).result(ANSWER_S).outcome.verification == pb.VERIFICATION_CONSISTENT
    answer = check(pair, manifest(2))
    assert (list(answer.findings), list(answer.sources)) == ([], ["update verified"])
    pair.mark()
    missing = ["layer.1.weight", "layer.1.bias"]
    assert found(check(pair, manifest(1))) == [("MISSING_TENSOR", missing, "error")]
    assert refusal(pair.send(pair.request("a part", tp_size=1))).reason == "MANIFEST_MISMATCH"
    pair.assert_untouched()
    part = pair.request("a part", tp_size=1)
    part.update.allow.missing.append("layer.1.*")
    assert pair.send(part).result(ANSWER_S).outcome.state == pb.UPDATE_STATE_COMMITTED


def test_a_checkpoint_that_cannot_be_read_refuses_nothing_and_says_why(start: StartPair, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half a header")
    pair = start(tp_size=1, server_info={"model_path": str(folder)})
    answer = check(pair, manifest())
    assert (list(answer.findings), list(answer.sources)) == ([], [])
    assert f"{folder}/model.safetensors is broken or not complete" in answer.unchecked[-1]
    assert pair.update("goes on", tp_size=1).state == pb.UPDATE_STATE_COMMITTED


# While a checkpoint is being read, the world goes on.


Story = Callable[["Reading"], Coroutine[None, None, None]]


class Reading:
    """A coordinator beside an engine, in this process, whose call is stopped while it reads the checkpoint."""

    def __init__(self, server: ScriptedEngine, memory: Memory) -> None:
        self.engine = GroupEngine(server.url, Timeouts())
        self.coordinator = Coordinator(self.engine, Timeouts())
        self._memory = memory

    async def call(self) -> asyncio.Task[object]:
        """Rank 0's call, up to the point where it waits for the checkpoint."""
        await self.engine.probe()
        tensor = SidecarTensor("layer.0.weight", "float32", (2, 3), 0, 24)
        known = await manifest_store.ManifestStore().add(Manifest((BucketSpec(64, (tensor,)),)), 0)
        header = Header(update_id="u", weight_version="7", rank=0, tp_size=1)
        call = asyncio.create_task(self.coordinator.update_weights(header, known, {0: self._memory}, 10.0))
        await asyncio.sleep(0)
        assert self.coordinator.current is None
        return call


def tell(story: Story, memory: Memory) -> None:
    """What happens while the checkpoint is read; the engine gets to know nothing of it."""
    with ScriptedEngine() as server:
        reading = Reading(server, memory)
        asyncio.run(_told(story, reading))
        assert server.paths() == []


async def _told(story: Story, reading: Reading) -> None:
    try:
        await story(reading)
    finally:
        reading.engine.close()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with SharedFile(bytes(64)) as file, socket.socket(socket.AF_UNIX) as manager:
        manager.bind(str(tmp_path / "manager.sock"))
        yield SharedMemory(str(tmp_path / "manager.sock"), file.name, 64)


def test_no_update_begins_in_a_sidecar_that_has_drained_meanwhile(memory: Memory) -> None:
    """It would be loading while its process ends."""

    async def story(reading: Reading) -> None:
        call = await reading.call()
        assert await reading.coordinator.drain(1.0)
        with pytest.raises(Draining):
            await call

    tell(story, memory)


def test_what_was_checked_against_one_server_is_not_loaded_into_another(memory: Memory) -> None:
    async def story(reading: Reading) -> None:
        call = await reading.call()
        reading.engine.epoch += 1  # as a look that finds another server does
        with pytest.raises(EngineRestarted):
            await call

    tell(story, memory)
