"""The example that has nothing but the stubs and torch works as its own text says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapter.demo.tiny_model import random_weights
from tests.e2e.engines import Stack, on_tp2

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "stubs_only.py"


@on_tp2
def test_a_trainer_with_the_stubs_alone_updates_a_real_server(stack: Stack, tmp_path: Path) -> None:
    stack.update(5)
    expected = stack.http.rank_checksums()
    stack.update(6)
    torch.save(dict(random_weights(5)), tmp_path / "weights.pt")
    version = stack.new_version()
    arguments = ["--target", stack.target, "--tp-size", "2", "--version", version]
    command = [sys.executable, str(EXAMPLE), *arguments, "--checkpoint", str(tmp_path / "weights.pt")]
    output = tmp_path / "output"
    with output.open("w") as file:  # no pipe: torch_shm_manager inherits it, and outlives the example
        ran = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=120, check=False)
    said = output.read_text()
    assert ran.returncode == 0, said
    assert said.count(f"the engine serves '{version}'") == 2
    assert stack.http.rank_checksums() == expected
    assert stack.http.weight_version() == version


def test_the_example_imports_only_the_stubs_torch_and_grpc() -> None:
    tree = ast.parse(EXAMPLE.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert own == {"grpc", "torch", "sidecar.v1"}
