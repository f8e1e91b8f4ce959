"""The proto is in buf's style, and breaks no contract that was released (``proto/baseline``)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASELINES = sorted((ROOT / "proto" / "baseline").glob("v*.binpb"))
BROKE = 100
"""buf's exit status when it found something to object to."""


def buf(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "buf", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def copy_of_the_contract(tmp_path: Path) -> Path:
    """A folder with the proto, to be changed."""
    shutil.copytree(ROOT / "proto" / "sidecar", tmp_path / "proto" / "sidecar")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def replace(contract: Path, old: str, new: str) -> None:
    file = contract / "proto" / "sidecar" / "v1" / "weight_sync.proto"
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    file.write_text(text.replace(old, new))


def test_the_proto_is_in_style() -> None:
    result = buf("lint")
    assert result.returncode == 0, result.stdout


def test_there_is_a_released_contract_to_compare_with() -> None:
    assert BASELINES


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda path: path.stem)
def test_the_proto_breaks_no_released_contract(baseline: Path) -> None:
    result = buf("breaking", "--against", baseline)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        pytest.param("  uint64 byte_offset = 4;", "  string byte_offset = 4;", "changed type", id="another type"),
        pytest.param("  uint64 byte_offset = 4;", "  uint64 byte_offset = 9;", "was deleted", id="another number"),
        pytest.param("  DATA_TYPE_BOOL = 15;", "", "was deleted", id="a removed value"),
        pytest.param(
            "  rpc GetStatus(GetStatusRequest) returns (GetStatusResponse);",
            "  rpc GetStatus(GetStatusRequest) returns (stream GetStatusResponse);",
            "unary to",
            id="a streamed answer",
        ),
    ],
)
def test_the_guard_bites(old: str, new: str, complaint: str, copy_of_the_contract: Path) -> None:
    replace(copy_of_the_contract, old, new)
    result = buf("breaking", "--against", BASELINES[-1], cwd=copy_of_the_contract)
    assert result.returncode == BROKE, result.stdout + result.stderr
    assert complaint in result.stdout


def test_an_addition_is_no_breakage(copy_of_the_contract: Path) -> None:
    member = "    // Host memory.\n    SharedMemoryHandle shared_memory = 2;\n"
    added = "    // Memory on another host.\n    SharedMemoryHandle remote_memory = 99;\n"
    replace(copy_of_the_contract, member, member + added)
    result = buf("breaking", "--against", BASELINES[-1], cwd=copy_of_the_contract)
    assert result.returncode == 0, result.stdout
