"""A trainer's process that exports one buffer again and again, each time with other bytes in it.

    python -m tests.gpu.exporter NUM_EXPORTS OPEN_EVERY

Every ``OPEN_EVERY``-th export is opened by another process (0: none), the others are taken back unopened. Prints what
it saw as one JSON object. A neighbour shares the buffer's allocation, so that a wrong offset would show in the bytes.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from adapter.exportable import allocate_flat
from adapter.exports import SHM, Export, export_of
from sidecar.v1 import weight_sync_pb2 as pb

BUFFER_BYTES = 4 << 20
WINDOW = 500
WARM_UP = 20
RELEASE_PATIENCE_S = 10.0


class Importer:
    """The other process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.gpu.importer"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def sum_of(self, handle: pb.CudaIpcHandle) -> int:
        """Have it open the memory, read it and let go."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(handle.SerializeToString().hex() + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


@dataclass
class Seen:
    """Over all exports."""

    export_s: list[float] = field(default_factory=list)
    """From filled memory to its handle."""
    release_s: list[float] = field(default_factory=list)
    """From the importer's last look, or the wish to take it back, to memory that may be written again."""
    opened: int = 0
    wrong_bytes: int = 0
    without_event: int = 0
    """Exports for which torch had no event left, so that it synchronised instead."""
    offsets: set[int] = field(default_factory=set)

    def figures(self) -> dict[str, Any]:
        """As the tests read them; times in microseconds, the first window against the last."""
        times = {}
        for name, seconds in (("export", self.export_s), ("release", self.release_s)):
            times[f"{name}_first_us"] = round(median(seconds[:WINDOW]) * 1e6, 1)
            times[f"{name}_last_us"] = round(median(seconds[-WINDOW:]) * 1e6, 1)
        counts = {"exports": len(self.export_s), "opened": self.opened, "wrong_bytes": self.wrong_bytes}
        return {**counts, "without_event": self.without_event, "offsets": sorted(self.offsets), **times}


@dataclass(frozen=True)
class Held:
    """What a leak would add to."""

    allocated: int
    reserved: int
    device_used: int
    descriptors: int
    threads: int
    resident: int
    files: int

    @classmethod
    def now(cls) -> "Held":
        """Of this process, and of the device as a whole."""
        free, total = torch.cuda.mem_get_info()
        process = psutil.Process()
        return cls(
            allocated=torch.cuda.memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            device_used=total - free,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            resident=process.memory_info().rss,
            files=len(list(Path(SHM).glob(f"torch_{os.getpid()}_*"))),
        )


def export_once(export: Export, number: int, importer: Importer | None, seen: Seen) -> None:
    """One life of the buffer."""
    export.flat.fill_(number % 251)
    torch.cuda.synchronize()
    started = time.perf_counter()
    handle = export.handle().cuda_ipc
    seen.export_s.append(time.perf_counter() - started)
    seen.without_event += not handle.event_sync_required
    seen.offsets.add(handle.storage_offset_bytes)
    if importer:
        seen.opened += 1
        seen.wrong_bytes += importer.sum_of(handle) != BUFFER_BYTES * (number % 251)
    started = time.perf_counter()
    if not importer:
        export.reclaim()
    while not export.released():
        assert time.perf_counter() - started < RELEASE_PATIENCE_S, f"export {number} is still held"
    seen.release_s.append(time.perf_counter() - started)


def main() -> None:
    """Export, and print what was seen."""
    exports, open_every = map(int, sys.argv[1:])
    neighbour = torch.full((BUFFER_BYTES,), 255, dtype=torch.uint8, device="cuda")
    export = export_of(allocate_flat(BUFFER_BYTES, torch.device("cuda", torch.cuda.current_device())))
    importer, seen = Importer(), Seen()
    for number in range(WARM_UP):
        export_once(export, number, importer, Seen())
    before = Held.now()
    for number in range(exports):
        wanted = bool(open_every) and number % open_every == 0
        export_once(export, number, importer if wanted else None, seen)
    after = Held.now()
    neighbour_is_whole = bool((neighbour == 255).all())
    importer.close()
    del export
    torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
    dropped = torch.cuda.memory_allocated() == neighbour.nbytes
    held = {"before": asdict(before), "after": asdict(after)}
    print(json.dumps({**seen.figures(), **held, "neighbour_is_whole": neighbour_is_whole, "dropped": dropped}))


if __name__ == "__main__":
    main()
