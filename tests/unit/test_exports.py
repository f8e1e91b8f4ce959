"""Host exports on the real /dev/shm, opened by another process as the engine opens them."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from adapter.exportable import allocate_flat
from adapter.exports import HostExport, export_of
from tests.fakes.shared_memory import files_of_this_process

SHM = Path("/dev/shm")
CPU = torch.device("cpu")
EXPORTS = 3000
IMPORTER = """
import sys, torch
from torch.multiprocessing.reductions import rebuild_storage_filename
for line in sys.stdin:  # manager, name, size
    manager, name, size = line.split()
    storage = rebuild_storage_filename(torch.UntypedStorage, manager.encode(), name.encode(), int(size))
    total = int(torch.empty(0, dtype=torch.uint8).set_(storage).sum(dtype=torch.int64))
    del storage  # an engine drops it; a process that merely ends keeps its count
    print(total, flush=True)
"""


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = files_of_this_process()
    yield
    gc.collect()
    assert files_of_this_process() <= before


def filled_export() -> HostExport:
    export = HostExport(allocate_flat(256, CPU))
    export.flat.copy_(torch.arange(256, dtype=torch.uint8))
    return export


def count_of(export: HostExport) -> int:
    name = export.flat.untyped_storage()._share_filename_cpu_()[1].decode()
    return int.from_bytes((SHM / name[1:]).read_bytes()[:4], "little")


class Importer(NamedTuple):
    """Another process that opens what it is told of, one after the other."""

    process: subprocess.Popen[str]

    def sum_of(self, export: HostExport) -> int:
        """Have it read the bytes and let them go."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        shared = export.handle().shared_memory
        self.process.stdin.write(f"{shared.manager_path} {shared.name} {shared.size_bytes}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def importer() -> Iterator[Importer]:
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Importer(process)
        process.communicate(timeout=60)


class Held(NamedTuple):
    """What a leak would add to."""

    files: set[str]
    descriptors: int
    threads: int
    resident_bytes: int

    @classmethod
    def now(cls) -> "Held":
        process = psutil.Process()
        gc.collect()
        return cls(files_of_this_process(), process.num_fds(), process.num_threads(), process.memory_info().rss)


def test_the_host_is_the_place_for_tensors_that_are_not_on_a_gpu() -> None:
    export = export_of(allocate_flat(64, CPU))
    assert isinstance(export, HostExport)
    assert (export.flat.dtype, export.flat.numel(), export.flat.dim()) == (torch.uint8, 64, 1)


def test_a_region_that_was_not_handed_over_is_released_and_leaves_nothing() -> None:
    export = filled_export()
    assert export.released()
    export.reclaim()


def test_a_handle_describes_a_file_that_is_there_with_both_counted() -> None:
    export = filled_export()
    shared = export.handle().shared_memory
    content = (SHM / shared.name[1:]).read_bytes()
    assert shared.size_bytes == 256
    assert Path(shared.manager_path).is_socket()
    assert int.from_bytes(content[:4], "little") == 2
    assert content[64:] == bytes(range(256))
    assert not export.released()
    export.reclaim()


def test_another_process_reads_the_bytes_and_lets_go_of_them() -> None:
    export = filled_export()
    with importer() as other:
        assert other.sum_of(export) == sum(range(256))
        assert export.released()
    assert count_of(export) == 1


def test_memory_that_nobody_opened_is_reclaimed_and_leaves_no_file() -> None:
    export = filled_export()
    export.handle()
    export.reclaim()
    assert export.released()
    export.reclaim()  # once is enough, twice does no harm
    assert export.released()


def test_one_buffer_is_exported_for_ever_with_nothing_piling_up() -> None:
    export = HostExport(allocate_flat(4096, CPU))
    with importer() as other:
        assert other.sum_of(export) == int(export.flat.sum(dtype=torch.int64))
        before = Held.now()
        for number in range(EXPORTS):
            export.flat.fill_(number % 251)
            if number % 3 == 2:  # one that the engine never saw
                export.handle()
                export.reclaim()
            else:
                assert other.sum_of(export) == 4096 * (number % 251)
            assert export.released()
        after = Held.now()
    assert after.files == before.files
    assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
    assert after.resident_bytes - before.resident_bytes < 4 << 20
    assert count_of(export) == 1


def test_a_region_is_not_lent_twice_at_a_time() -> None:
    export = filled_export()
    export.handle()
    with pytest.raises(AssertionError, match="still holds"):
        export.handle()
    export.reclaim()
    export.handle()
    export.reclaim()


def test_a_dropped_region_leaves_no_file_though_the_object_lives_on() -> None:
    """An exception keeps the frames that it came through, and with them whatever they name."""
    before = files_of_this_process()
    export = filled_export()
    export.handle()
    with pytest.raises(AssertionError, match="still holds"):
        export.drop()
    export.reclaim()
    assert files_of_this_process() > before
    export.drop()
    assert files_of_this_process() == before
    assert export.released()


def test_what_is_released_stays_so_whatever_the_count_says_later() -> None:
    """A later hand-over must not bring an earlier one's record back."""
    export = filled_export()
    export.handle()
    export.reclaim()
    export.flat.untyped_storage()._shared_incref()  # type: ignore[no-untyped-call]
    assert export.released()
    export.reclaim()
    assert count_of(export) == 2
    export.flat.untyped_storage()._shared_decref()
