"""The examples with a real trainer work as their own texts say: each starts its server, trains, and ends everything."""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.image import imread

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(550)]

EXAMPLES = Path(__file__).parents[2] / "examples"
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RUN_S = 400.0
END_S = 60.0
# Of the folders in which the examples keep what a run needs.
PREFIXES = ("plain-loop-", "fsdp2-", "grpo-")


@dataclass(frozen=True, slots=True)
class Run:
    """How an example ended."""

    status: int
    said: str

    def numbers(self, pattern: str) -> list[float]:
        """What each step told, in order."""
        return [float(number) for number in re.findall(pattern, self.said, re.MULTILINE)]


def run_example(name: str, folder: Path, *arguments: str, launcher: tuple[str, ...] = PYTHON) -> Run:
    before = folders()
    output = folder / "output"
    with output.open("w") as file:  # no pipe: torch_shm_manager inherits it, and outlives the example
        command = [*launcher, str(EXAMPLES / name), *arguments]
        example = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
        try:
            status = example.wait(RUN_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} was not through after {RUN_S:g} s and had said:\n{output.read_text()}")
        finally:
            end(example)
    assert folders() <= before
    return Run(status, output.read_text())


def end(example: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that it can end its server; nothing if it has ended."""
    example.terminate()
    try:
        example.wait(END_S)
    except subprocess.TimeoutExpired:
        example.kill()
        example.wait()


def folders() -> set[Path]:
    found = Path(tempfile.gettempdir()).iterdir()
    return {path for path in found if path.name.startswith(PREFIXES)}


def test_the_plain_loop_brings_every_step_to_the_server(tmp_path: Path) -> None:
    run = run_example("plain_loop.py", tmp_path)
    assert run.status == 0, run.said
    assert run.numbers(r"^step +(\d+):") == list(range(1, 41))
    assert "says 14 17 20 23 26 29 32 35\nstep 21:" in run.said, "after the first lesson it counts by three"
    assert run.said.endswith("says 16 21 26 31 36 41 46 51\nThe server was sent 40 versions and followed every one.\n")


def test_two_fsdp2_ranks_own_a_server_that_answers_as_their_sharded_model(tmp_path: Path) -> None:
    run = run_example("fsdp2.py", tmp_path, launcher=TORCHRUN)
    assert run.status == 0, run.said
    assert run.numbers(r"^step +(\d+):") == list(range(1, 21))
    apart = run.numbers(r"at most (\S+) apart$")
    assert len(apart) == 21
    assert max(apart) < 1e-3
    assert "in the end, the server says 14 17 20 23 26 29 32 35," in run.said
    assert "2 ranks sent 20 versions, and the server counts by three." in run.said


def test_a_toy_reward_is_learned_from_the_servers_samples_and_drawn(tmp_path: Path) -> None:
    run = run_example("grpo_toy.py", tmp_path, "--steps", "25")
    assert run.status == 0, run.said
    rewards = run.numbers(r"^step.* reward (\S+),")
    assert len(rewards) == 25
    assert rewards[0] < 0.15, "chance, 1 in 16"
    assert rewards[-1] > 0.8
    assert run.numbers(r"ratio (\S+),") == pytest.approx([1.0] * 25, abs=1e-3)
    assert max(run.numbers(r"apart (\S+),")) < 1e-3 < 0.1 < min(run.numbers(r"moved (\S+)$"))
    assert_is_a_drawing(tmp_path / "reward.png")


def assert_is_a_drawing(png: Path) -> None:
    pixels = imread(png)
    height, width, _ = pixels.shape
    assert min(height, width) > 500
    colours = {tuple(pixel) for row in pixels[::4] for pixel in row[:, :3].tolist()}
    assert len(colours) > 20, "curves of two colours, softened at their edges, and text"


def test_an_example_whose_claim_does_not_hold_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    run = run_example("plain_loop.py", tmp_path, "--steps", "1")
    assert run.status == 1, run.said
    assert "AssertionError: after the lesson the server says (" in run.said
