"""One CUDA buffer that is exported for ever, against a process that opens it: time and memory stay flat."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.gpu import figures

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

MIB = 1 << 20


def exported(num_exports: int, open_every: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.gpu.exporter", str(num_exports), str(open_every)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=240)
    seen: dict[str, Any] = json.loads(done.stdout)
    figures.keep(f"{num_exports} exports of one buffer, 1 in {open_every} opened", seen)
    return seen


@pytest.mark.parametrize(
    ("num_exports", "open_every", "opened"),
    [
        pytest.param(3000, 10, 300, id="every-tenth-is-opened"),
        pytest.param(3000, 1, 3000, id="every-one-is-opened"),
        pytest.param(25_000, 0, 0, id="more-than-two-files-of-counters"),
    ],
)
def test_exports_of_one_buffer_leave_time_and_memory_flat(num_exports: int, open_every: int, opened: int) -> None:
    seen = exported(num_exports, open_every)
    before, after = seen["before"], seen["after"]
    assert (seen["exports"], seen["opened"], seen["wrong_bytes"]) == (num_exports, opened, 0)
    assert seen["without_event"] == 0, "torch ran out of events: some export was not let go"
    assert seen["export_last_us"] < 1.5 * seen["export_first_us"]
    assert seen["release_last_us"] < 1.5 * seen["release_first_us"]
    for flat in ("allocated", "reserved", "descriptors", "threads", "files"):
        assert after[flat] == before[flat], flat
    assert after["resident"] - before["resident"] < 4 * MIB
    assert abs(after["device_used"] - before["device_used"]) < 32 * MIB
    assert seen["neighbour_is_whole"]
    assert seen["dropped"]


def test_a_buffer_that_does_not_begin_its_allocation_is_described_by_its_offset() -> None:
    assert exported(500, 50)["offsets"] == [4 * MIB]
