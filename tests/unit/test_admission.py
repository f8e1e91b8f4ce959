"""What an engine can take: memory that its ranks can open where they run, and pauses that suit the update."""

import dataclasses
import struct
from collections.abc import Iterator

import pytest

from sidecar import admission, memory
from sidecar.engine.info import parse
from sidecar.errors import InvalidRequest, Reason, UnsuitableEngine
from sidecar.header import Header, PauseMode
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.memory import CudaIpcMemory, Placement

FIRST, SECOND = "6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c50", "6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c51"
MANIFEST = Manifest((BucketSpec(64, (TensorSpec("w", "uint8", (64,), 0, 64),)),))
COUNTERS = "/torch_test_admission"


@pytest.fixture(autouse=True)
def _counters() -> Iterator[None]:
    file = memory.SHM_DIRECTORY / COUNTERS[1:]
    file.write_bytes(bytes(64) + struct.pack("<q", 1))
    yield
    file.unlink()


def on_gpu(uuid: str) -> CudaIpcMemory:
    return CudaIpcMemory(
        device_uuid=uuid,
        memory_handle=b"\x01c" + bytes(64),
        size_bytes=64,
        storage_offset_bytes=0,
        ref_counter_handle=COUNTERS,
        ref_counter_offset=0,
        event_handle=b"",
        event_sync_required=False,
    )


def check(uuid: str, rank: int, **known: object) -> None:
    placement = dataclasses.replace(Placement(device="cuda"), **known)  # type: ignore[arg-type]
    admission.check_handles({0: on_gpu(uuid)}, MANIFEST, rank, placement)


def test_memory_of_the_ranks_own_gpu_passes() -> None:
    for rank, uuid in enumerate((FIRST, SECOND)):
        check(uuid, rank, gpu_uuids=(FIRST, SECOND), host_gpus=frozenset({FIRST, SECOND}))


@pytest.mark.parametrize("here", [2, 1], ids=["here", "on-another-host"])
def test_memory_of_another_gpu_is_refused_with_both_named_and_what_to_do(here: int) -> None:
    with pytest.raises(UnsuitableEngine) as raised:
        check(FIRST, 1, gpu_uuids=(FIRST, SECOND), num_here=here)
    assert raised.value.reason is Reason.GPU_MISMATCH
    assert raised.value.message == (
        f"rank 1, bucket 0: the memory is on GPU-{FIRST}, but the engine's TP rank 1 runs on GPU-{SECOND}; "
        "send rank 1's weights from that GPU, or name the engine's with serve --gpu-uuids if that is wrong"
    )
    assert raised.value.details == {"rank": "1", "gpu": f"GPU-{FIRST}", "engineGpu": f"GPU-{SECOND}"}


@pytest.mark.parametrize("gpu_uuids", [(), ("", ""), (FIRST, ""), (FIRST,)])
def test_a_rank_whose_gpu_is_not_known_is_not_checked(gpu_uuids: tuple[str, ...]) -> None:
    check(SECOND, 1, gpu_uuids=gpu_uuids)


def test_a_gpu_that_this_host_lacks_is_refused_where_its_gpus_are_known() -> None:
    with pytest.raises(InvalidRequest, match=f"rank 0, bucket 0: GPU '{SECOND}' is not on this host; it has {FIRST}"):
        check(SECOND, 0, host_gpus=frozenset({FIRST}))
    check(SECOND, 0)


def test_a_gpu_of_another_host_is_not_looked_for_on_this_one() -> None:
    check(SECOND, 1, host_gpus=frozenset({FIRST}), num_here=1)


@pytest.mark.parametrize("release", ["0.5.20", "0.5.23"])
@pytest.mark.parametrize("changes", [{"two_phase": True}, {"group_name": "g"}, {"two_phase": True, "group_name": "g"}])
def test_an_update_that_waits_for_its_trainer_needs_a_pause(release: str, changes: dict[str, object]) -> None:
    info = parse({"version": release, "tp_size": 1, "device": "cpu"})
    for mode in PauseMode:
        header = Header(
            update_id="u",
            weight_version="v",
            rank=0,
            tp_size=1,
            pause_mode=mode,
            **changes,  # type: ignore[arg-type]
        )
        if mode is not PauseMode.NONE:
            admission.check_suits_engine(header, info, num_buckets=1)
            continue
        with pytest.raises(UnsuitableEngine, match="needs a pause; choose another pause mode than none") as raised:
            admission.check_suits_engine(header, info, num_buckets=1)
        assert raised.value.reason is Reason.PAUSE_MODE_UNSUITABLE
