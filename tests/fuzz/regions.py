"""Memory that a trainer would hand over: files in /dev/shm that are there, so that the engine's side can let go of it.

Invariant: names are the same for the same process; every file is gone afterwards.
"""

import itertools
import os
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import SharedFile
from tests.fuzz.valid import BUCKET_BYTES

NEVER_USED_UP = 1 << 30
"""Importers of one file: it is handed over again and again."""
NUM_SLOTS = 64
PLACES = 4
LEASED_FROM, KEPT_FROM = 2, 3
"""Places of which a replay loader may keep the memory, and those that it keeps already."""
LEASE = "sglang-weight-sync-lease-" + "0" * 32
_numbers = itertools.count()


class Regions:
    """Of all ranks of one trainer."""

    def __init__(self, device: str, folder: Path) -> None:
        self._device = device
        folder.mkdir(parents=True, exist_ok=True)
        self._manager = socket.socket(socket.AF_UNIX)
        self._manager_path = str(folder / "manager.sock")
        self._manager.bind(self._manager_path)
        self._files: dict[tuple[int, int], SharedFile] = {}
        self._counters = Path("/dev/shm") / f"torch_{os.getpid()}_fuzz_counters_{next(_numbers)}"
        self._counters.write_bytes(bytes(64) + struct.pack("<q", 1) * NUM_SLOTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._counters.unlink()
        self._manager.close()

    def handle(self, rank: int, place: int) -> pb.MemoryHandle:
        """Memory of that rank."""
        place %= PLACES
        return self._on_gpu(rank, place) if self._device == "cuda" else self._on_host(rank, place)

    def _on_host(self, rank: int, place: int) -> pb.MemoryHandle:
        file = self._files.get((rank, place))
        if file is None:
            file = self._files[rank, place] = SharedFile(bytes(BUCKET_BYTES), importers=NEVER_USED_UP)
        shared = pb.SharedMemoryHandle(manager_path=self._manager_path, name=file.name, size_bytes=file.size_bytes)
        return pb.MemoryHandle(shared_memory=shared, loan=place)

    def _on_gpu(self, rank: int, place: int) -> pb.MemoryHandle:
        cuda = pb.CudaIpcHandle(
            device_uuid=f"GPU-00000000-0000-0000-0000-{rank:012x}",
            memory_handle=b"\x01c" + bytes([rank, place]) * 32,
            storage_size_bytes=BUCKET_BYTES,
            storage_offset_bytes=512 * place,
            ref_counter_handle=f"/{self._counters.name}",
            ref_counter_offset=(rank * PLACES + place) % NUM_SLOTS,
            event_handle=bytes(64),
            event_sync_required=True,
            lease=LEASE if place >= LEASED_FROM else "",
            kept=place >= KEPT_FROM,
            ready_event=bytes(64) if place >= KEPT_FROM else b"",
        )
        return pb.MemoryHandle(cuda_ipc=cuda)
