"""A trainer's span reaches the engine: as gRPC metadata first, then as the header of every call of its update."""

import pytest
import torch
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider

from adapter import WeightSyncClient
from sidecar.tracing import trace_of
from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.conftest import StartPair
from tests.integration.support import LOAD, wait_until

SENT = f"00-{'a' * 32}-{'b' * 16}-01"
WEIGHTS = [("layer.0.weight", torch.ones(2, 3))]


def test_the_calls_of_an_update_carry_the_trainers_trace(start: StartPair) -> None:
    assert propagate.get_global_textmap()
    pair = start(tp_size=1)
    tracer = TracerProvider().get_tracer("trainer")
    with WeightSyncClient(pair.target, rank=0, tp_size=1) as client:
        with tracer.start_as_current_span("rl step") as span:
            context = span.get_span_context()
            pair.mark()
            client.update_weights(WEIGHTS, version="1")
        steps = [call for call in pair.engine.calls[pair._mark :] if call.method == "POST"]
        trace_id, span_id = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
        expected = f"00-{trace_id}-{span_id}-{context.trace_flags:02x}"
        assert [call.headers.get("traceparent") for call in steps] == [expected] * len(steps)
        assert len(steps) >= 5
        pair.mark()
        client.update_weights(WEIGHTS, version="2")
    assert all("traceparent" not in call.headers for call in pair.engine.calls[pair._mark :])


def test_an_update_in_several_buckets_carries_the_trace_of_its_beginning(start: StartPair) -> None:
    pair = start(tp_size=1)
    tracer = TracerProvider().get_tracer("trainer")
    weights = [(f"layer.{i}.weight", torch.ones(8, 8)) for i in range(3)]
    client = WeightSyncClient(pair.target, rank=0, tp_size=1, bucket_bytes=256)
    with client, tracer.start_as_current_span("rl step") as span:
        client.update_weights(weights, version="1")
    loads = [call.headers.get("traceparent") or "" for call in pair.engine.calls if call.path == LOAD]
    assert len(loads) == 3
    assert {load.split("-")[1] for load in loads} == {trace.format_trace_id(span.get_span_context().trace_id)}


def test_an_update_belongs_to_the_first_trace_that_one_of_its_ranks_brings(start: StartPair) -> None:
    """Not to the last one's, whose call completes it: often rank 0 alone is traced."""
    pair = start(tp_size=2)
    pair.mark()
    metadata = (("traceparent", SENT),)
    first = pair.rpc.UpdateWeights.future(pair.request("u", 1), timeout=20, metadata=metadata)
    wait_until(lambda: list(pair.status().current_update.waiting_for_ranks) == [0])
    second = pair.send(pair.request("u", 0))
    assert {answer.result(20).outcome.state for answer in (first, second)} == {pb.UPDATE_STATE_COMMITTED}
    steps = [call for call in pair.engine.calls[pair._mark :] if call.method == "POST"]
    assert {call.headers.get("traceparent") for call in steps} == {SENT}


@pytest.mark.parametrize("sent", ["", "nonsense", "00-" + "0" * 32, "00-" + "a" * 32 + "-" + "b" * 16 + "-01\r\nx: y"])
def test_what_is_no_traceparent_is_not_passed_on(sent: str) -> None:
    assert trace_of([("traceparent", sent)]) == ""
