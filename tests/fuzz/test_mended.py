"""What fuzzing has found and was mended, in words: one test each. The requests themselves are in ``seeds.txt``."""

import json
import time

import pytest

from sidecar import convert, lora, refusals
from sidecar import manifest as manifests
from sidecar import memory as memories
from sidecar.errors import InvalidRequest, Reason
from sidecar.header import Header
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.memory import CudaIpcMemory, Memory, SharedMemory
from sidecar.update import Update
from sidecar.v1 import weight_sync_pb2 as pb

HEADER = Header(update_id="u", weight_version="v", rank=0, tp_size=2)
CUDA = CudaIpcMemory(
    device_uuid="00000000-0000-0000-0000-000000000000",
    memory_handle=bytes(64),
    size_bytes=4096,
    storage_offset_bytes=0,
    ref_counter_handle="/torch_of_another_host",
    ref_counter_offset=2**64 - 1,
    event_handle=bytes(64),
    event_sync_required=True,
)
HALF_A_SURROGATE = "\ud800"


def refusal_of_shape(*shape: int, size_bytes: int = 0) -> InvalidRequest:
    bucket = BucketSpec(64, (TensorSpec("w", "float32", shape, 0, size_bytes),))
    with pytest.raises(InvalidRequest) as refused:
        manifests.check(Manifest((bucket,)), rank=1)
    return refused.value


def test_a_shape_of_very_many_dimensions_is_refused_at_once() -> None:
    """The product of 100,000 of them took 40 s, and could not be printed: ValueError."""
    started = time.monotonic()
    assert "has 100000 dimensions; at most 64 are possible" in refusal_of_shape(*[2**62] * 100_000).message
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("shape", [(2**62, 2**62, 0), (0, 2**62, 2**62), (2**40, 2**40, 0)])
def test_an_empty_shape_that_torch_cannot_count_is_refused(shape: tuple[int, ...]) -> None:
    """Torch's reshape raises "numel: integer multiplication overflow", which ends the scheduler."""
    assert "is more than torch can count" in refusal_of_shape(*shape).message


def adapter(**config: object) -> lora.AdapterSpec:
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return lora.parse(json.dumps(good | config), name="a", pinned=False, replace=False, rank=0)


@pytest.mark.parametrize(
    "config",
    [
        {"r": HALF_A_SURROGATE},
        {"lora_alpha": f"a\nb{HALF_A_SURROGATE}"},
        {"target_modules": ["q_proj", HALF_A_SURROGATE]},
        {"target_modules": ["q\nproj"]},
        {"target_modules": ["q" * 129]},
        {"bias": ["x" * 60_000]},
        {"peft_type": "x" * 60_000},
    ],
)
def test_an_odd_config_is_refused_in_one_short_line_that_utf8_can_carry(config: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        adapter(**config)
    assert refused.value.message.encode().isascii()
    assert len(refused.value.message) < 1000
    assert refused.value.message.isprintable()


def test_a_module_that_is_not_listed_is_refused_without_the_whole_list() -> None:
    spec = adapter(target_modules=[f"module_{number}" for number in range(2000)])
    name = "model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = (
        TensorSpec(name.format("A"), "float32", (4, 8), 0, 128),
        TensorSpec(name.format("B"), "float32", (8, 4), 128, 128),
    )
    with pytest.raises(InvalidRequest, match="is not among target_modules") as refused:
        lora.check_tensors(spec, Manifest((BucketSpec(256, tensors),)), rank=0)
    assert len(refused.value.message) < 1000


def test_a_ranks_own_words_become_one_line_of_bounded_length() -> None:
    update = Update(HEADER, Manifest(()), "")
    said = refusals.aborted_by(update, 1, "out of\nmemory\x00\u202e" + "!" * 10_000_000).message
    assert said.startswith("rank 1 aborted update 'u': out of memory")
    assert said.isprintable()
    assert len(said) < 600
    assert refusals.aborted_by(update, 1, "\n ").message.endswith(": no reason given")


def test_a_list_of_buckets_is_cut_short() -> None:
    update = Update(HEADER, Manifest(()), "")
    said = refusals.unpushed_buckets(update, 1, list(range(30_000))).message
    assert said.endswith(
        "buckets [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19] and 29980 more"
    )
    assert refusals.unpushed_buckets(update, 1, [1, 2]).message.endswith("buckets [1, 2]")
    many = Manifest(tuple(BucketSpec(64, ()) for _ in range(30_000)))
    assert len(manifests.first_difference(many, Manifest(many.buckets[:-1]))) < 600


def test_an_unknown_id_is_not_repeated_without_an_end() -> None:
    assert len(refusals.unknown_update("x" * 10_000_000, 64).message) < 300


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (CUDA, "ref_counter_offset 18446744073709551615 is past the end of any counters' file"),
        (SharedMemory("/m", "/torch_of_another_host", 2**63), "size_bytes 9223372036854775808 is no memory's"),
        (SharedMemory("/" + "m" * 107, "/torch_of_another_host", 4096), "must be 1 to 107 printable bytes"),
        (SharedMemory("/a\0b", "/torch_of_another_host", 4096), "must be 1 to 107 printable bytes"),
        (SharedMemory("", "/torch_of_another_host", 4096), "must be 1 to 107 printable bytes"),
    ],
)
def test_what_torch_cannot_open_anywhere_is_refused_of_other_hosts_too(memory: Memory, said: str) -> None:
    """Nothing of another host's memory can be looked at from here; numbers and paths that torch raises for can."""
    with pytest.raises(InvalidRequest) as refused:
        memories.check(memory, 4096, "rank 1, bucket 0", here=False)
    assert said in refused.value.message


@pytest.mark.parametrize("path", ["/a\0b", "/a\nb", "/" + "x" * 256, "/x" * 2049])
def test_a_path_that_no_folder_can_have_is_refused(path: str) -> None:
    request = pb.UpdateWeightsFromDiskRequest(update_id="u", weight_version="v", model_path=path)
    with pytest.raises(InvalidRequest, match="cannot be a folder's") as refused:
        convert.disk_header(request)
    assert refused.value.details == {"field": "model_path"}
    assert convert.disk_header(pb.UpdateWeightsFromDiskRequest(model_path="/models/größer"))


def test_very_many_patterns_are_refused_and_very_many_names_are_not() -> None:
    convert.allowance(pb.ManifestAllowance(unknown=["*a"] * 1000, missing=[f"name {n}" for n in range(5000)]))
    with pytest.raises(InvalidRequest, match=r"allow\.missing has 1001 patterns; at most 1000") as refused:
        convert.allowance(pb.ManifestAllowance(missing=["*a"] * 1001))
    assert refused.value.reason is Reason.INVALID_HEADER
