"""Every check of a memory handle: what passes here is opened by the engine, and a wrong one kills it."""

import dataclasses
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar import memory as memories
from sidecar.errors import InvalidRequest, Reason
from sidecar.memory import CudaIpcMemory, Memory, Placement, SharedMemory, bare_uuid, check, is_seen, let_go
from tests.fakes import SharedFile, shared_memory

UUID = "6b7c1a2e-0d3f-4a5b-8c9d-0e1f2a3b4c5d"
CUDA = CudaIpcMemory(
    device_uuid=UUID,
    memory_handle=b"\x01c" + bytes(64),
    size_bytes=1024,
    storage_offset_bytes=512,
    ref_counter_handle="/torch_1_2_3",
    ref_counter_offset=5,
    event_handle=bytes(64),
    event_sync_required=True,
)


@pytest.fixture(autouse=True)
def _counters() -> Iterator[None]:
    """Torch's file of reference counters: slot 5 is an export that nobody has opened, slot 6 one that was."""
    file = memories.SHM_DIRECTORY / CUDA.ref_counter_handle[1:]
    file.write_bytes(bytes(64) + struct.pack("<8q", 0, 0, 0, 0, 0, 1, 0, 2**63 - 1))
    yield
    file.unlink()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedMemory]:
    with SharedFile(bytes(1024)) as file, socket.socket(socket.AF_UNIX) as manager:
        manager.bind(str(tmp_path / "manager.sock"))
        yield SharedMemory(str(tmp_path / "manager.sock"), file.name, 1024)


def refusal(memory: Memory, needed_bytes: int = 1024) -> str:
    with pytest.raises(InvalidRequest) as raised:
        check(memory, needed_bytes, "rank 1, bucket 0")
    assert raised.value.reason is Reason.INVALID_HANDLE
    assert raised.value.message.startswith("rank 1, bucket 0: ")
    return raised.value.message


@pytest.mark.parametrize(
    "handle",
    [
        pytest.param(bytes(64), id="old-torch"),
        pytest.param(b"\x01c" + bytes(64), id="cudaMalloc"),
        pytest.param(b"\x01e" + bytes(24 + 4), id="expandable-segment"),
    ],
)
def test_every_form_of_torchs_cuda_handle_passes(handle: bytes) -> None:
    check(dataclasses.replace(CUDA, memory_handle=handle), 1024, "rank 0, bucket 0")


def test_an_event_is_not_needed_where_none_must_be_waited_for() -> None:
    check(dataclasses.replace(CUDA, event_handle=b"", event_sync_required=False), 1024, "rank 0, bucket 0")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"memory_handle": b""}, "memory_handle of 0 bytes is none of torch's", id="no-handle"),
        pytest.param({"memory_handle": bytes(63)}, "memory_handle of 63 bytes", id="short-handle"),
        pytest.param({"memory_handle": bytes(67)}, "memory_handle of 67 bytes", id="long-handle"),
        pytest.param({"memory_handle": b"\x01x" + bytes(64)}, "memory_handle of 66 bytes", id="unknown-type"),
        pytest.param({"memory_handle": b"\x01e" + bytes(10)}, "memory_handle of 12 bytes", id="short-segment"),
        pytest.param({"event_handle": bytes(8)}, "event_handle has 8 bytes instead of 64", id="short-event"),
        pytest.param({"lease": "../x"}, "lease '../x' is not a lease's name", id="lease-elsewhere"),
        pytest.param({"kept": True}, "lease '' is not a lease's name", id="kept-without-a-lease"),
        pytest.param({"ready_event": bytes(8)}, "ready_event has 8 bytes instead of 64", id="short-ready-event"),
        pytest.param({"ref_counter_handle": ""}, "reference counters: '' is not of the form /name", id="no-counter"),
        pytest.param(
            {"ref_counter_handle": "x"}, "reference counters: 'x' is not of the form", id="counter-without-slash"
        ),
        pytest.param({"ref_counter_handle": "/x/../y"}, "'/x/../y' is not of the form", id="counter-elsewhere"),
        pytest.param({"ref_counter_handle": "/torch_gone"}, "cannot see /torch_gone", id="counter-gone"),
        pytest.param({"ref_counter_offset": 8}, "ref_counter_offset 8 is past the end", id="counter-outside"),
        pytest.param({"ref_counter_offset": 2**64}, "is past the end", id="counter-huge"),
        pytest.param({"ref_counter_offset": 6}, "the reference count of this handle is 0", id="counter-released"),
        pytest.param({"storage_offset_bytes": 3}, "storage_offset_bytes 3", id="misaligned-storage"),
        pytest.param({"storage_offset_bytes": 2**63}, "are no place in memory", id="huge-offset"),
        pytest.param({"size_bytes": 2**63}, "are no place in memory", id="huge-size"),
        pytest.param({"memory_handle": b"\x02e" + bytes(26)}, "memory_handle of 28 bytes", id="half-a-segment"),
        pytest.param({"size_bytes": 1023}, "spans 1023 bytes, the bucket needs 1024", id="too-small"),
        pytest.param({"device_uuid": ""}, "device_uuid '' is not a GPU's UUID", id="no-gpu"),
        pytest.param({"device_uuid": "0"}, "device_uuid '0' is not a GPU's UUID", id="an-ordinal"),
    ],
)
def test_a_bad_cuda_handle_is_refused_with_its_value(changes: dict[str, object], said: str) -> None:
    assert said in refusal(dataclasses.replace(CUDA, **changes))  # type: ignore[arg-type]


def test_a_real_file_of_enough_bytes_passes(shared: SharedMemory) -> None:
    check(shared, 1024, "rank 0, bucket 0")


@pytest.mark.parametrize(
    "name",
    ["", "x", "/", "/.", "/..", "/../etc/passwd", "/a/b", "/torch\0null"],
    ids=["empty", "no-slash", "slash", "dot", "dotdot", "traversal", "subfolder", "null-byte"],
)
def test_a_name_that_is_none_of_shared_memory_is_refused(name: str, shared: SharedMemory) -> None:
    assert "is not of the form /name" in refusal(dataclasses.replace(shared, name=name))


def test_shared_memory_that_is_not_there_is_refused(shared: SharedMemory) -> None:
    said = refusal(dataclasses.replace(shared, name="/torch_gone"))
    assert "shared memory: cannot see /torch_gone (No such file or directory)" in said
    assert "must share /dev/shm" in said


def test_a_folder_is_not_shared_memory(shared: SharedMemory) -> None:
    folder = memories.SHM_DIRECTORY / f"weight-sync-test-{os.getpid()}"
    folder.mkdir()
    try:
        assert "is no file" in refusal(dataclasses.replace(shared, name=f"/{folder.name}", size_bytes=1), 1)
    finally:
        folder.rmdir()


def test_a_file_shorter_than_it_is_said_to_be_is_refused(shared: SharedMemory) -> None:
    said = refusal(dataclasses.replace(shared, size_bytes=1025))
    assert f"shared memory {shared.name} has 1088 bytes, too few for 1025" in said


def test_memory_smaller_than_its_bucket_is_refused(shared: SharedMemory) -> None:
    assert "spans 1024 bytes, the bucket needs 1025" in refusal(shared, needed_bytes=1025)


@pytest.mark.parametrize("path", ["", "/nowhere/manager.sock", "/dev/null", "/a\0b", "/" + 100 * "long/"])
def test_a_manager_that_the_engine_could_not_reach_is_refused(path: str, shared: SharedMemory) -> None:
    said = refusal(dataclasses.replace(shared, manager_path=path))
    assert f"cannot see torch_shm_manager's socket {path[:128]!r}" in said
    assert "must share the temporary directory" in said


def test_shared_memory_without_a_share_for_the_engine_is_refused(tmp_path: Path) -> None:
    """The engine would remove the file as it lets go, and a load that was lost would look like one that was done."""
    with SharedFile(bytes(64), importers=0) as file, socket.socket(socket.AF_UNIX) as manager:
        manager.bind(str(tmp_path / "manager.sock"))
        said = refusal(SharedMemory(str(tmp_path / "manager.sock"), file.name, 64), needed_bytes=64)
    assert "count" in said


def test_shared_memory_is_let_go_once_the_engine_has_opened_and_dropped_it(shared: SharedMemory) -> None:
    assert not let_go(shared), "not opened, or in use"
    shared_memory.release(shared.name)
    assert let_go(shared)


def test_an_export_of_a_gpu_is_let_go_once_its_counter_is_0() -> None:
    assert not let_go(CUDA)
    assert let_go(dataclasses.replace(CUDA, ref_counter_offset=4))
    assert not let_go(dataclasses.replace(CUDA, ref_counter_offset=7)), "anything but 0"


@pytest.mark.parametrize(
    "memory",
    [
        SharedMemory("/manager", "/torch_gone", 64),
        dataclasses.replace(CUDA, ref_counter_handle="/torch_gone"),
        dataclasses.replace(CUDA, ref_counter_offset=8),
    ],
    ids=["no-file", "no-counters", "no-such-counter"],
)
def test_memory_whose_count_cannot_be_read_was_not_let_go(memory: Memory) -> None:
    assert not let_go(memory)


# Memory of the ranks of other hosts.


def refusal_elsewhere(memory: Memory) -> str:
    with pytest.raises(InvalidRequest) as raised:
        check(memory, 1024, "rank 1, bucket 0", here=False)
    return raised.value.message


@pytest.mark.parametrize(
    "memory",
    [
        SharedMemory("/elsewhere/manager.sock", "/torch_elsewhere", 1024),
        dataclasses.replace(CUDA, ref_counter_handle="/torch_elsewhere"),
    ],
    ids=["host", "gpu"],
)
def test_memory_of_another_host_need_not_be_seen_here(memory: Memory) -> None:
    assert not is_seen(memory)
    check(memory, 1024, "rank 1, bucket 0", here=False)
    assert "cannot see /torch_elsewhere" in refusal(memory)


def test_the_form_of_a_handle_of_another_host_is_checked_all_the_same() -> None:
    shared = SharedMemory("/elsewhere/manager.sock", "/torch_elsewhere", 1024)
    assert "is not of the form /name" in refusal_elsewhere(dataclasses.replace(shared, name="/../etc"))
    assert "spans 8 bytes" in refusal_elsewhere(dataclasses.replace(shared, size_bytes=8))
    gpu = dataclasses.replace(CUDA, ref_counter_handle="/torch_elsewhere")
    assert "memory_handle of 1 bytes" in refusal_elsewhere(dataclasses.replace(gpu, memory_handle=b"x"))
    assert "is not a GPU's UUID" in refusal_elsewhere(dataclasses.replace(gpu, device_uuid="0"))
    assert "reference counters: 'x' is not of the form" in refusal_elsewhere(
        dataclasses.replace(gpu, ref_counter_handle="x")
    )


def test_what_this_host_shows_of_another_nodes_memory_is_checked(shared: SharedMemory) -> None:
    """Two nodes may be on one host; the manager's socket is still the other node's own affair."""
    elsewhere = dataclasses.replace(shared, manager_path="/elsewhere/manager.sock")
    assert is_seen(elsewhere)
    check(elsewhere, 1024, "rank 1, bucket 0", here=False)
    shared_memory.release(shared.name)
    assert "without a share for the engine" in refusal_elsewhere(elsewhere)
    assert is_seen(CUDA)
    released = dataclasses.replace(CUDA, ref_counter_offset=6)
    assert "the reference count of this handle is 0" in refusal_elsewhere(released)


@pytest.mark.parametrize("name", ["", "x", "/a/b", "/torch\0null", "/torch_gone"])
def test_a_name_that_leads_to_no_file_is_not_seen(name: str) -> None:
    assert not is_seen(SharedMemory("/manager", name, 64))
    assert not is_seen(dataclasses.replace(CUDA, ref_counter_handle=name))


def test_the_first_ranks_are_here_and_what_is_not_said_is_unknown() -> None:
    two_nodes = Placement(num_here=2, gpu_uuids=(UUID, ""))
    assert [two_nodes.is_here(rank) for rank in range(4)] == [True, True, False, False]
    assert [two_nodes.gpu_of(rank) for rank in range(4)] == [UUID, "", "", ""]
    assert Placement().is_here(7)


@pytest.mark.parametrize("text", [UUID, f"GPU-{UUID}", UUID.upper(), f"GPU-{UUID.upper()}", f" gpu-{UUID} "])
def test_a_uuid_is_the_same_with_and_without_its_prefix_and_in_any_case(text: str) -> None:
    assert bare_uuid(text) == UUID
