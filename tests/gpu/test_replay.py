"""The replay loader on GPUs: what it writes, what it keeps mapped, and that it lets go of it."""

import time
from pathlib import Path
from statistics import median

import pytest

from tests.gpu import figures
from tests.gpu.conftest import Setup, gpu_used_mib, running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

PROMPT = [11, 22, 33, 44, 55]
GIB = 1 << 30
WHOLE_MODEL = 20 * GIB
WAYS = ["recorded", "proven", "replayed", "replayed", "replayed", "replayed"]


@pytest.mark.parametrize(
    ("in_place", "bucket_bytes"), [(True, WHOLE_MODEL), (False, GIB)], ids=["in-place", "staged-in-buckets"]
)
def test_replays_give_the_weights_of_a_load_from_disk_and_leave_no_mapping(
    tmp_path: Path, tp_size: int, *, in_place: bool, bucket_bytes: int
) -> None:
    with running(tmp_path, shape="middle", tp_size=tp_size, bucket_bytes=bucket_bytes) as setup:
        setup.generate(PROMPT, 8)  # compiles kernels
        tokens, checksums = [], []
        for number, way in enumerate(WAYS):
            results = setup.ranks.all_do(do="update", version=str(number), in_place=in_place)
            assert [(rank["load_path"], rank["notes"]) for rank in results] == [(way, [])] * tp_size
            tokens.append(setup.generate(PROMPT, 8))
            checksums.append(setup.engine.rank_checksums())
        assert tokens[0] == tokens[2] == tokens[4] != tokens[1] == tokens[3] == tokens[5]
        setup.ranks.all_do(do="save", folder=str(tmp_path / "checkpoint"))
        setup.engine.load_from_disk(tmp_path / "checkpoint")
        assert setup.engine.rank_checksums() == checksums[1] == checksums[5] != checksums[4]
        _check_that_memory_comes_back(setup)


def _check_that_memory_comes_back(setup: Setup) -> None:
    """When the trainer says so, and when it is killed."""
    assert all(rank["seconds"] < 2 for rank in setup.ranks.all_do(do="let_go"))
    assert setup.ranks.all_do(do="update", version="100")[0]["load_path"] == "replayed"
    for rank in setup.ranks.ranks:
        rank.kill()
    alone = _settled_mib()
    setup.ranks.ranks[:] = [setup.start_rank(number) for number in range(len(setup.ranks.ranks))]
    for version in ("101", "102"):
        assert setup.ranks.all_do(do="update", version=version)[0]["load_path"] == "replayed"
    for rank in setup.ranks.ranks:
        rank.kill()
    assert _settled_mib() <= alone + 64
    figures.keep("memory of killed trainers", {"engine_alone_mib": alone, "after_mib": _settled_mib()})


def _settled_mib() -> int:
    """What the first GPU holds once it does not change any more."""
    last = -1
    for _ in range(40):
        now = gpu_used_mib()
        if now == last:
            return now
        last = now
        time.sleep(0.5)
    return last


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "staged"])
def test_an_8b_model_replays_and_its_figures_are_kept(tmp_path: Path, tp_size: int, *, in_place: bool) -> None:
    with running(tmp_path, shape="8b", tp_size=tp_size, bucket_bytes=WHOLE_MODEL) as setup:
        if in_place:
            setup.ranks.all_do(do="update", version="0", in_place=True)
        floor = max(rank["seconds"] for rank in setup.ranks.all_do(do="copy"))
        updates = []
        for version in range(1, 16):
            results = setup.ranks.all_do(do="update", version=str(version), in_place=in_place)
            updates.append(max(results, key=lambda rank: rank["seconds"]))
        assert {update["load_path"] for update in updates[3:]} == {"replayed"}
        seconds = [update["seconds"] for update in updates[5:]]
        phases = {name: median(update["phases"][name] for update in updates[5:]) for name in updates[-1]["phases"]}
        seen = {
            "in_place": in_place,
            "tp_size": tp_size,
            "copy_ms": round(floor * 1000, 2),
            "sync_ms": [round(value * 1000, 2) for value in (median(seconds), min(seconds), max(seconds))],
            "ratio": round(median(seconds) / floor, 2),
            "phases_ms": {name: round(value * 1000, 2) for name, value in phases.items()},
            "first_ms": [round(update["seconds"] * 1000) for update in updates[:4]],
        }
        figures.keep("replay", seen)
