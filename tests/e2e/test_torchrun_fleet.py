"""The example under torchrun, as two nodes on this host: one's rank feeds a fleet, the other's takes part."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from adapter.launch import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(550)]

EXAMPLE = Path(__file__).parents[2] / "examples/torchrun_fleet.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
RUN_S, END_S = 400.0, 60.0
STEPS = 20
COUNTS = "they say 14 17 20 23 26 29 32 35"


def folders() -> set[Path]:
    found = Path(tempfile.gettempdir()).iterdir()
    return {path for path in found if path.name.startswith("torchrun-fleet-")}


@contextmanager
def node(number: int, port: int, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One torchrun, which is ended as an operator would."""
    where = ("--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port))
    command = [*TORCHRUN, *where, str(EXAMPLE), "--steps", str(STEPS)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:  # no pipe: torch_shm_manager inherits it, and outlives the example
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=output.parent, env=environment)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(END_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def test_two_nodes_of_a_sharded_trainer_bring_every_version_into_two_engines(tmp_path: Path) -> None:
    before, port = folders(), free_port()
    outputs = [tmp_path / f"node-{number}" for number in range(2)]
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(number, port, output)) for number, output in enumerate(outputs)]
        try:
            statuses = [one.wait(RUN_S) for one in nodes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"it was not through after {RUN_S:g} s and had said:\n{outputs[0].read_text()}")
    said, of_the_other = (output.read_text() for output in outputs)
    assert statuses == [0, 0], said + of_the_other
    steps = [int(step) for step in re.findall(r"^step +(\d+): .* 2 engines in", said, re.MULTILINE)]
    assert steps == list(range(1, STEPS + 1))
    (last,) = re.findall(rf"^step {STEPS}: .*$", said, re.MULTILINE)
    assert last.endswith(COUNTS)
    assert COUNTS not in said.partition("\n")[0], "it was learned"
    assert f"engine-0 serves version {STEPS}\nengine-1 serves version {STEPS}\n2 ranks sent {STEPS} versions.\n" in said
    assert "step" not in of_the_other
    assert folders() <= before
