"""Trainer and engine on one GPU, each in the other's memory: twenty RL steps leave it as it was."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from tests.gpu import figures
from tests.gpu.conftest import gpu_used_mib

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560)]

STEPS = 20


def test_twenty_rl_steps_with_released_memory_are_right_and_flat(tmp_path: Path) -> None:
    before = gpu_used_mib()
    with (tmp_path / "trainer.log").open("w") as log:
        command = [sys.executable, "-m", "tests.gpu.rl_trainer", str(tmp_path), str(STEPS)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=540, check=False)
    assert done.returncode == 0, (tmp_path / "trainer.log").read_text()[-4000:]
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert [step["version"] for step in steps] == [str(number + 2) for number in range(STEPS)]
    odd, even = steps[::2], steps[1::2]
    assert all(step["tokens"] == odd[0]["tokens"] for step in odd)
    assert all(step["tokens"] == even[0]["tokens"] for step in even)
    assert odd[0]["tokens"] != even[0]["tokens"]
    assert {step["unreleased"] for step in steps} == {0}
    assert len({step["trainer_bytes"] for step in steps}) == 1
    assert len({step["end_mib"] for step in steps[1:]}) == 1, [step["end_mib"] for step in steps]
    assert all(step["resident_mib"] - step["released_mib"] > 20_000 for step in steps)
    assert gpu_used_mib() <= before + 1
    figures.keep(
        "memory saver",
        {
            "steps": STEPS,
            "before_mib": before,
            "resident_mib": sorted({step["end_mib"] for step in steps}),
            "released_mib": sorted({step["released_mib"] for step in steps}),
            "update_ms": round(median(step["update_s"] for step in steps) * 1000, 1),
        },
    )
