"""Older and newer sides meet: each is told clearly what the other cannot do."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from adapter import IncompatibleSidecar, WeightSyncClient
from adapter.errors import from_rpc_error
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import shared_memory
from tests.integration.support import Pair

Method = Callable[[bytes, grpc.ServicerContext], bytes]
ENGINE = pb.EngineInfo(version="0.5.23", tp_size=1, device="cpu", dialect="0.5.21", uses_sessions=True)


@contextmanager
def another_release(folder: Path, methods: Mapping[str, Method]) -> Iterator[str]:
    """A server that has these methods of the service and no others, bytes in and bytes out."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        handlers: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in methods.items()}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("sidecar.v1.WeightSyncService", handlers),)
        )
        target = f"unix:{folder}/other.sock"
        server.add_insecure_port(target)
        server.start()
        try:
            yield target
        finally:
            server.stop(None).wait()


def capabilities(*features: pb.Feature.ValueType) -> Method:
    answer = pb.GetCapabilitiesResponse(sidecar_version="0.0.1", features=features, engine=ENGINE)
    return lambda _request, _context: answer.SerializeToString()


def update(target: str, bucket_bytes: int = 1 << 20) -> None:
    with WeightSyncClient(target, rank=0, tp_size=1, bucket_bytes=bucket_bytes) as client:
        try:
            client.update_weights([("a", torch.zeros(64)), ("b", torch.zeros(64))], version="v1", timeout=5)
        finally:
            assert client.unreleased_bytes == 0


@pytest.mark.parametrize(
    ("bucket_bytes", "feature", "said"),
    [
        (1 << 20, pb.FEATURE_BUCKETED_UPDATE, "cannot do one_call_update"),
        (64, pb.FEATURE_ONE_CALL_UPDATE, "cannot do bucketed_update"),
    ],
)
def test_an_older_sidecar_without_the_feature_is_named_with_its_release(
    tmp_path: Path, bucket_bytes: int, feature: pb.Feature.ValueType, said: str
) -> None:
    methods = {"GetCapabilities": capabilities(feature)}
    with another_release(tmp_path, methods) as target, pytest.raises(IncompatibleSidecar) as raised:
        update(target, bucket_bytes)
    assert str(raised.value) == f"the sidecar at {target} (0.0.1) {said}; upgrade it"


def test_a_server_without_the_service_is_told_apart(tmp_path: Path) -> None:
    said = "is older than this adapter: Method not found!; upgrade it"
    with another_release(tmp_path, {}) as target, pytest.raises(IncompatibleSidecar, match=said):
        update(target)


def test_an_older_sidecar_that_lacks_a_call_is_told_so(tmp_path: Path) -> None:
    methods = {"GetCapabilities": capabilities(pb.FEATURE_ONE_CALL_UPDATE)}
    with another_release(tmp_path, methods) as target, WeightSyncClient(target, rank=0, tp_size=1) as client:
        with pytest.raises(IncompatibleSidecar, match=f"the sidecar at {target} is older than this adapter"):
            client.get_update("v1")
        with pytest.raises(IncompatibleSidecar, match="upgrade it"):
            client.status()


def test_an_older_sidecar_without_the_update_call_gives_the_memory_back(tmp_path: Path) -> None:
    methods = {"GetCapabilities": capabilities(pb.FEATURE_ONE_CALL_UPDATE)}
    with another_release(tmp_path, methods) as target, pytest.raises(IncompatibleSidecar):
        update(target)


def test_a_newer_sidecars_unknown_features_and_fields_do_no_harm(tmp_path: Path) -> None:
    outcome = pb.UpdateOutcome(update_id="v1", weight_version="v1", state=pb.UPDATE_STATE_COMMITTED, num_posted=1)
    committed = pb.UpdateWeightsResponse(outcome=outcome).SerializeToString()
    newer = capabilities(pb.FEATURE_ONE_CALL_UPDATE)
    unknown = b"\x10\x63" + b"\xf8\x07\x01"  # features += 99; field 127 = 1

    def update_weights(request: bytes, _context: grpc.ServicerContext) -> bytes:
        handle = pb.UpdateWeightsRequest.FromString(request).handles[0].shared_memory
        shared_memory.release(handle.name)
        return committed + b"\xf8\x07\x01"

    status = pb.GetStatusResponse(state=pb.SIDECAR_STATE_READY, engine=ENGINE).SerializeToString()
    methods = {
        "GetCapabilities": lambda r, c: newer(r, c) + unknown,
        "GetStatus": lambda _r, _c: status + b"\xf8\x07\x01",
        "UpdateWeights": update_weights,
    }
    with another_release(tmp_path, methods) as target:
        update(target)


def test_a_newer_adapters_field_is_refused_by_name_as_an_incompatible_sidecar(pair: Pair) -> None:
    request = pair.request("from the future")
    request.update.MergeFromString(b"\xf8\x07\x01")  # field 127 = 1
    error = pair.send(request).exception()
    assert isinstance(error, grpc.RpcError)
    typed = from_rpc_error(error, pair.target)
    assert type(typed) is IncompatibleSidecar
    assert "field 127 of UpdateHeader is unknown to this sidecar" in str(typed)
    assert "upgrade the sidecar, or ask only for the features that GetCapabilities lists" in str(typed)
    assert typed.details["field"] == "127"
    pair.assert_untouched()
