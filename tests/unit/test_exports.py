"""Host exports on the real /dev/shm, opened by another process as the engine opens them."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter.exports import HostExport, allocate

SHM = Path("/dev/shm")
IMPORTER = """
import sys, torch
from torch.multiprocessing.reductions import rebuild_storage_filename
manager, name, size = sys.argv[1:]
storage = rebuild_storage_filename(torch.UntypedStorage, manager.encode(), name.encode(), int(size))
print(sum(torch.empty(0, dtype=torch.uint8).set_(storage).tolist()))
del storage  # an engine drops it; a process that merely ends keeps its count
"""


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = files_of_this_process()
    yield
    gc.collect()
    assert files_of_this_process() <= before


def files_of_this_process() -> set[str]:
    return {path.name for path in SHM.glob(f"torch_{os.getpid()}_*")}


def filled_export() -> HostExport:
    export = HostExport(256)
    export.flat.copy_(torch.arange(256, dtype=torch.uint8))
    return export


def test_the_host_is_the_place_for_tensors_that_are_not_on_a_gpu() -> None:
    export = allocate(64, torch.device("cpu"))
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
    shared = export.handle().shared_memory
    command = [sys.executable, "-c", IMPORTER, shared.manager_path, shared.name, str(shared.size_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == sum(range(256))
    assert export.released()
    assert int.from_bytes((SHM / shared.name[1:]).read_bytes()[:4], "little") == 1


def test_memory_that_nobody_opened_is_reclaimed_and_leaves_no_file() -> None:
    export = filled_export()
    export.handle()
    export.reclaim()
    assert export.released()
    export.reclaim()  # once is enough, twice does no harm
    assert export.released()
