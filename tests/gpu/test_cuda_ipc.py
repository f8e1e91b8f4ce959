"""Real CUDA IPC into real SGLang servers: run with `make test-gpu` on a machine with one or two GPUs."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.gpu import figures
from tests.gpu.conftest import Setup, running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560)]

UPDATES = 50
PROMPT = [11, 22, 33, 44, 55]
GIB = 1 << 30
WHOLE_MODEL = 20 * GIB


def test_fifty_updates_leave_right_weights_and_no_memory_behind(tmp_path: Path, tp_size: int) -> None:
    with running(tmp_path, shape="middle", tp_size=tp_size, bucket_bytes=GIB) as setup:
        setup.generate(PROMPT, 8)  # compiles kernels
        before = setup.ranks.all_do(do="memory")
        tokens, checksums = _alternate(setup, UPDATES)
        assert setup.ranks.all_do(do="memory") == before
        assert all(rank["unreleased"] == 0 for rank in before)
        odd, even = tokens[::2], tokens[1::2]
        assert odd == [odd[0]] * len(odd)
        assert even == [even[0]] * len(even)
        assert odd[0] != even[0]
        assert checksums["1"] != checksums["2"]
        assert checksums["1"] == checksums["3"]
        setup.ranks.all_do(do="save", folder=str(tmp_path / "checkpoint"))
        setup.engine.load_from_disk(tmp_path / "checkpoint")
        assert setup.engine.rank_checksums() == checksums["2"] == checksums[str(UPDATES)]


@pytest.mark.parametrize("bucket_bytes", [WHOLE_MODEL, 2 * GIB], ids=["whole-model", "2GiB-buckets"])
def test_an_8b_model_syncs_and_its_figures_are_kept(tmp_path: Path, tp_size: int, bucket_bytes: int) -> None:
    with running(tmp_path, shape="8b", tp_size=tp_size, bucket_bytes=bucket_bytes) as setup:
        floor = setup.ranks.all_do(do="copy")
        before = setup.ranks.all_do(do="memory")
        updates = [setup.ranks.all_do(do="update", version=str(version)) for version in range(1, 13)]
        assert all(rank["weight_version"] == str(1 + past) for past, update in enumerate(updates) for rank in update)
        assert setup.ranks.all_do(do="memory") == before
        _keep_figures(tp_size, bucket_bytes, [rank["seconds"] for rank in floor], updates[2:])


def _alternate(setup: Setup, updates: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy tokens after every update, and some checksums by version."""
    tokens, checksums = [], {}
    for version in map(str, range(1, updates + 1)):
        results = setup.ranks.all_do(do="update", version=version)
        assert all(rank["weight_version"] == version for rank in results)
        assert setup.engine.weight_version() == version
        tokens.append(setup.generate(PROMPT, 8))
        if version in ("1", "2", "3", str(updates)):
            checksums[version] = setup.engine.rank_checksums()
    return tokens, checksums


def _keep_figures(tp_size: int, bucket_bytes: int, floor_s: list[float], updates: list[list[dict[str, Any]]]) -> None:
    """Medians over updates of the slowest rank, and the ratio to a bare copy on the same GPU."""
    slowest = [max(update, key=lambda rank: rank["seconds"]) for update in updates]
    seconds = median(rank["seconds"] for rank in slowest)
    phases = {name: median(rank["phases"][name] for rank in slowest) for name in slowest[0]["phases"]}
    seen = {
        "tp_size": tp_size,
        "bucket_bytes": bucket_bytes,
        "posts": slowest[0]["num_posts"],
        "copy_ms": round(max(floor_s) * 1000, 1),
        "sync_ms": round(seconds * 1000, 1),
        "ratio": round(seconds / max(floor_s), 2),
        "phases_ms": {name: round(value * 1000, 1) for name, value in phases.items()},
    }
    figures.keep("sync", seen)
