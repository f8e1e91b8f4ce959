"""What others build on is pinned: names, parameters, calls, features."""

import inspect
import re
from pathlib import Path

import adapter
from adapter import errors, fleet, known_manifest
from sidecar.errors import Reason
from sidecar.servicer import DTYPES, FEATURES, WeightSyncServicer
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

METHODS = {method.name for method in pb.DESCRIPTOR.services_by_name["WeightSyncService"].methods}
NOT_USED_BY_THE_ADAPTER: set[str] = set()


def test_the_adapters_names_are_these() -> None:
    assert adapter.__all__ == [
        "Credentials", "EngineUnreachable", "GenerateClient", "Generation", "IncompatibleSidecar", "LaunchError",
        "MemoryNeed", "MemoryNotExportable", "NotAllowed", "RanksMissing",
        "SidecarUnreachable", "TensorSpec", "UpdateAborted", "UpdateFailed", "UpdateRefused", "UpdateResult",
        "UpdateStillApplying", "VerlEngine", "WeightSyncClient", "WeightSyncError", "allocate_flat",
    ]  # fmt: skip
    assert all(hasattr(adapter, name) for name in adapter.__all__)


def test_the_clients_parameters_are_these() -> None:
    assert list(inspect.signature(adapter.WeightSyncClient).parameters) == [
        "target", "rank", "tp_size", "bucket_bytes", "staging_buffers", "device", "fused_groups",
        "allow_expandable_segments", "credentials", "restart_patience", "transport",
    ]  # fmt: skip
    assert list(inspect.signature(adapter.WeightSyncClient.update_weights).parameters) == [
        "self", "named_tensors", "version", "update_id", "specs", "in_place", "check_finite", "pause_mode",
        "flush_cache", "selector", "verify", "content_digest", "allow_unknown", "allow_missing", "timeout",
    ]  # fmt: skip


def test_every_rpc_is_used_by_the_adapter_or_listed_here() -> None:
    source = "".join(path.read_text() for path in Path(adapter.__file__).parent.rglob("*.py"))
    used = set(re.findall(r"\brpc\.(\w+)", source))
    assert used & METHODS | NOT_USED_BY_THE_ADAPTER == METHODS
    assert not used & NOT_USED_BY_THE_ADAPTER


def test_every_rpc_is_implemented_by_the_servicer() -> None:
    implemented = {name for name in METHODS if name in vars(WeightSyncServicer)}
    assert implemented == METHODS
    assert {name for name in dir(pb_grpc.WeightSyncServiceServicer) if name[0].isupper()} == METHODS


def test_the_sidecar_announces_all_that_its_protocol_names() -> None:
    assert [pb.Feature.Name(feature) for feature in FEATURES] == list(pb.Feature.keys())[1:]
    assert [pb.DataType.Name(dtype) for dtype in DTYPES] == list(pb.DataType.keys())[1:]


def test_the_adapter_tells_errors_apart_by_reasons_that_the_sidecar_has() -> None:
    assert set(errors._BY_REASON) <= set(Reason)
    assert known_manifest.MANIFEST_UNKNOWN in set(Reason)


def test_every_error_of_the_adapter_is_in_the_tree_at_the_top_of_its_file() -> None:
    there = [*vars(errors).values(), *vars(fleet).values()]
    kinds = {kind.__name__ for kind in there if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert kinds == set(re.findall(r"(?:^    |x )(\w+)", errors.__doc__ or "", re.MULTILINE))


def test_nothing_unpickles() -> None:
    for folder in ("sidecar", "adapter"):
        for path in (Path(adapter.__file__).parent.parent / folder).rglob("*.py"):
            source = path.read_text()
            assert not re.search(r"pickle\.(loads?|Unpickler)|torch\.load\(", source), path
            assert "import pickle" not in source or path.name == "payload.py", path
