"""The checked-in stubs are what the proto gives, and run on the installed protobuf and grpcio."""

import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]
CHECKED_IN = ROOT / "sidecar" / "v1"
GENERATED = ("weight_sync_pb2.py", "weight_sync_pb2.pyi", "weight_sync_pb2_grpc.py", "weight_sync_pb2_grpc.pyi")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stubs that `make proto` would write, elsewhere."""
    folder = tmp_path_factory.mktemp("generated")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, "proto/sidecar/v1/weight_sync.proto"]
    plugins = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run(command, cwd=ROOT, env=plugins, check=True, capture_output=True)
    return folder / "sidecar" / "v1"


@pytest.mark.parametrize("name", GENERATED)
def test_regenerating_gives_no_difference(name: str, regenerated: Path) -> None:
    assert (CHECKED_IN / name).read_text() == (regenerated / name).read_text(), "run `make proto`"


def test_nothing_else_lies_among_the_generated_files() -> None:
    present = {path.name for path in CHECKED_IN.iterdir() if path.is_file()}
    assert present == {*GENERATED, "__init__.py"}


def test_the_stubs_work_with_the_installed_protobuf() -> None:
    request = pb.UpdateWeightsRequest(update=pb.UpdateHeader(update_id="1", weight_version="7", rank=1, tp_size=2))
    assert pb.UpdateWeightsRequest.FromString(request.SerializeToString()) == request


def test_every_rpc_of_the_contract_has_a_stub_and_a_servicer_method() -> None:
    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["WeightSyncService"].methods]
    assert methods
    for method in methods:
        assert callable(getattr(pb_grpc.WeightSyncServiceServicer, method))
