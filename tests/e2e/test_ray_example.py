"""The example with Ray works on a cluster of this host as its own text says, and ends everything that it started."""

import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(550)]

EXAMPLE = Path(__file__).parents[2] / "examples/ray_fleet.py"
RUN_S, END_S = 450.0, 40.0
MARK = "RAY_FLEET_TEST"
PREFIX = "ray-fleet-"
# gloo must not look for the host's name; Ray must not ask who else needs this host's memory, nor for a way home.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0"}
SAYS = r"^  (engine-\d) serves version (\S+) and says ([\d ]+)$"


def folders() -> set[Path]:
    found = Path(tempfile.gettempdir()).iterdir()
    return {path for path in found if path.name.startswith(PREFIX)}


def marked(mark: str) -> Iterator[int]:
    """Processes that have it in their environment: whatever the example started, and what that did."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:  # it has ended
            continue


def gone(mark: str) -> bool:
    """The last of them are given a moment."""
    give_up = time.monotonic() + END_S
    while any(marked(mark)) and time.monotonic() < give_up:
        time.sleep(0.2)
    return not any(marked(mark))


def end(example: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that it can end its cluster; nothing if it has ended."""
    example.terminate()
    try:
        example.wait(END_S)
    except subprocess.TimeoutExpired:
        example.kill()
        example.wait()


def run_example(folder: Path, mark: str, *arguments: str) -> tuple[int, str]:
    output = folder / "output"
    with output.open("w") as file:  # no pipe: torch_shm_manager inherits it, and outlives the example
        environment = {**os.environ, **ENVIRONMENT, MARK: mark}
        command = [sys.executable, str(EXAMPLE), *arguments]
        example = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=environment)
        try:
            return example.wait(RUN_S), output.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail(f"it was not through after {RUN_S:g} s and had said:\n{output.read_text()}")
        finally:
            end(example)


def test_a_fleet_of_ray_actors_loses_one_and_its_successor_catches_up(tmp_path: Path) -> None:
    before, mark = folders(), secrets.token_hex(8)
    status, said = run_example(tmp_path, mark, "--engines", "2", "--updates", "2")
    assert status == 0, said
    answers = [(name, version) for name, version, _ in re.findall(SAYS, said, re.MULTILINE)]
    assert answers == [
        ("engine-0", "1"), ("engine-1", "1"),
        ("engine-0", "2"), ("engine-1", "2"),
        ("engine-0", "3"),  # the other one is dead
        ("engine-0", "3"), ("engine-1", "3"),
    ]  # fmt: skip
    spoken = [tokens for *_, tokens in re.findall(SAYS, said, re.MULTILINE)]
    assert len(set(spoken)) == 3, "one answer for each version"
    assert spoken[4:] == [spoken[4]] * 3
    steps = re.findall(
        r"^(?:version \d: \d engines|engine-1 was \w+|caught up with version \d: .*)", said, re.MULTILINE
    )
    assert steps == [
        "version 1: 2 engines", "version 2: 2 engines", "engine-1 was killed", "version 3: 1 engines",
        "engine-1 was replaced", "caught up with version 3: 1 of 1",
    ]  # fmt: skip
    assert "engine-1 was replaced, and serves version default" in said
    assert said.endswith("2 engines serve version 3.\n")
    assert gone(mark)
    assert folders() <= before
