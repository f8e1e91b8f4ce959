"""What importing costs: the sidecar stays free of torch and SGLang, the adapter of SGLang."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "sglang", "transformers", "numpy")
REPORT = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def packages_after_importing(*modules: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds afterwards."""
    program = f"import {', '.join(modules)}\n{REPORT}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["sidecar", "sidecar.v1.weight_sync_pb2_grpc", "sidecar.cli", "sidecar.server"])
def test_the_sidecar_imports_nothing_heavy(module: str) -> None:
    assert packages_after_importing(module).isdisjoint({*HEAVY, "adapter"})


def test_the_package_itself_costs_nothing() -> None:
    assert packages_after_importing("sidecar").isdisjoint({"grpc", "google", "requests"})


def test_the_adapter_needs_neither_sglang_nor_transformers() -> None:
    assert packages_after_importing("adapter").isdisjoint({"sglang", "transformers"})
