"""What the trainer's side takes of a GPU, and from where: bounded, exportable, and given back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch_memory_saver

from tests.gpu import figures
from tests.gpu.conftest import Setup, running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560)]

BUCKET_BYTES = 768 << 20
"""A twentieth of the model; its embeddings alone are larger."""


def test_a_model_of_twenty_buckets_stays_within_the_stated_memory_and_goes_in_place_and_as_dtensors(
    tmp_path: Path,
) -> None:
    with running(tmp_path, shape="8b", tp_size=1, bucket_bytes=BUCKET_BYTES) as setup:
        seen = {way: _checksums_after(setup, way) for way in ("staged", "in_place", "dtensors")}
    peak, in_place, dtensors = (seen[way][0] for way in ("staged", "in_place", "dtensors"))
    assert peak["posts"] >= 20
    assert peak["grown"] <= peak["stated"]
    assert peak["reserved_grown"] <= peak["stated"]
    assert peak["stated"] - peak["grown"] < 64 << 20
    assert dtensors["grown"] <= dtensors["stated"]
    assert (in_place["posts"], in_place["grown"], in_place["reserved_grown"]) == (1, 0, 0)
    assert seen["staged"][1] == seen["in_place"][1] == seen["dtensors"][1]
    assert all(way[0]["left"] == 0 for way in seen.values())
    figures.keep("trainer memory", {way: figures_of for way, (figures_of, _) in seen.items()})


def _checksums_after(setup: Setup, way: str) -> tuple[dict[str, Any], Any]:
    """What an update took, and what the engine holds after it."""
    took = setup.ranks.ranks[0].do(do="measured", way=way, version=f"{way} 1")
    assert "error" not in took, took
    return took, setup.engine.rank_checksums()


CHECKS = ["plain", "expandable", "memory_saver", "forked", "freed_in_place"]


@pytest.mark.parametrize("check", CHECKS)
def test_memory_is_exportable_or_refused_wherever_the_trainer_allocates(check: str) -> None:
    environment = dict(os.environ)
    if check == "expandable":
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if check == "memory_saver":
        with torch_memory_saver.configure_subprocess():
            environment = dict(os.environ)
    command = [sys.executable, "-m", "tests.gpu.allocator_checks", check]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures.keep(f"allocator {check}", json.loads(done.stdout.splitlines()[-1]))
