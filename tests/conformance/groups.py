"""What the sidecar relies on in SGLang's routes for torch.distributed groups; a part of the contract.

No trainer is needed: a group is made of the engine's own ranks, so that its first rank is the one that broadcasts.
Invariant: as the contract's; what is broadcast are tensors that no model has, and every group is left again.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.conformance.client import EngineUnderTest, is_schema_error, outcome

INIT, DESTROY = "/init_weights_update_group", "/destroy_weights_update_group"
RECEIVE = "/update_weights_from_distributed"
JOINED = (200, True, "Succeeded to initialize custom process group.")
LEFT = (200, True, "Succeeded to destroy custom process group.")
NEVER_JOINED = (400, False, "The group to be destroyed does not exist.")
NOT_MADE = "Failed to initialize custom process group:"
NAME_IN_USE = "The specified group name has already been created, please use a different group name."
OUTSIDE = (400, False, "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()")
RECEIVED = "Succeeded to update parameter online."
HALF_LOADED = "The full weights of the ModelRunner are partially updated. Please discard the whole weights."


def group_of_its_own(engine: EngineUnderTest, name: str) -> dict[str, object]:
    """A body for joining a group that nobody else is in."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address, port = free.getsockname()
    place = {"master_address": address, "master_port": port, "rank_offset": 0, "world_size": engine.tp_size}
    return {**place, "group_name": name, "backend": "gloo"}


def bucket(group: str, *tensors: tuple[str, str, list[int]]) -> dict[str, object]:
    """A body for receiving one."""
    parts = {"names": [name for name, _, _ in tensors], "dtypes": [dtype for _, dtype, _ in tensors]}
    shapes = [shape for _, _, shape in tensors]
    return {**parts, "shapes": shapes, "group_name": group, "load_format": "flattened_bucket", "flush_cache": False}


@contextmanager
def joined(engine: EngineUnderTest, name: str) -> Iterator[None]:
    """It is in a group of its own."""
    assert outcome(engine.post(INIT, group_of_its_own(engine, name))) == JOINED
    try:
        yield
    finally:
        assert outcome(engine.post(DESTROY, {"group_name": name})) == LEFT


@contextmanager
def loading(engine: EngineUnderTest) -> Iterator[None]:
    """Generation stands still, and the engine takes weights."""
    with engine.paused("retract"):
        if not engine.since("0.5.21"):
            yield
            return
        assert outcome(engine.post("/begin_weight_update", {"selector": "all"})) == (200, True, "Success")
        try:
            yield
        finally:
            assert outcome(engine.post("/end_weight_update")) == (200, True, "Success")


def every_release_has_groups(engine: EngineUnderTest) -> None:
    assert {INIT, DESTROY, RECEIVE} <= set(engine.get("/openapi.json").json()["paths"])
    assert [engine.get(path).status_code for path in (INIT, DESTROY, RECEIVE)] == [405, 405, 405]


def calls_about_groups_have_a_schema(engine: EngineUnderTest) -> None:
    group = group_of_its_own(engine, "not-made")
    assert is_schema_error(engine.post(INIT), "'missing'")
    for field, value, problem in (
        ("master_address", 3, "valid string"),
        ("master_port", "x", "valid integer"),
        ("world_size", None, "valid integer"),
        ("group_name", None, "valid string"),
        ("backend", 3, "valid string"),
    ):
        assert is_schema_error(engine.post(INIT, group | {field: value}), problem)
    for path in (INIT, DESTROY, RECEIVE):
        assert is_schema_error(engine.post_raw(path, b""), "Field required")
    assert is_schema_error(engine.post(DESTROY, {"group_name": None}), "valid string")


def a_bucket_has_a_schema(engine: EngineUnderTest) -> None:
    good = bucket("no-such-group", ("x", "float32", [1]))
    assert is_schema_error(engine.post(RECEIVE), "'missing'")
    for field, value, problem in (
        ("names", "x", "valid list"),
        ("dtypes", [1], "valid string"),
        ("shapes", [1], "valid list"),
        ("shapes", [["x"]], "valid integer"),
        ("group_name", None, "valid string"),
        ("load_format", 3, "valid string"),
    ):
        assert is_schema_error(engine.post(RECEIVE, good | {field: value}), problem)
    if engine.since("0.5.21"):
        assert is_schema_error(engine.post(RECEIVE, good | {"selector": "some"}), "Input should be")


def a_group_that_was_never_joined_cannot_be_left(engine: EngineUnderTest) -> None:
    assert outcome(engine.post(DESTROY, {"group_name": "no-such-group"})) == NEVER_JOINED
    assert outcome(engine.post(DESTROY)) == NEVER_JOINED


def a_bucket_of_an_unknown_group_is_refused_since_0_5_21(engine: EngineUnderTest) -> None:
    if not engine.since("0.5.21"):
        return  # it kills the server
    body = bucket("no-such-group", ("no.such.tensor", "float32", [1])) | {"weight_version": "x", "selector": "target"}
    hint = "Please call `init_weights_update_group` first."
    assert outcome(engine.post(RECEIVE, body)) == OUTSIDE
    with loading(engine):
        problem = f"Failed to receive weights: Group no-such-group not in []. {hint}"
        assert outcome(engine.post(RECEIVE, body)) == (400, False, problem)
    with joined(engine, "another"), loading(engine):
        problem = f"Failed to receive weights: Group no-such-group not in ['another']. {hint}"
        assert outcome(engine.post(RECEIVE, body)) == (400, False, problem)
    assert engine.weight_version() != "x"


def a_group_is_joined_once_until_it_is_left(engine: EngineUnderTest) -> None:
    for _ in range(2):
        with joined(engine, "conformance"):
            again = outcome(engine.post(INIT, group_of_its_own(engine, "conformance")))
            assert again == (400, False, f"{NOT_MADE} {NAME_IN_USE}")
        assert outcome(engine.post(DESTROY, {"group_name": "conformance"})) == NEVER_JOINED


def an_engine_is_in_several_groups_at_once(engine: EngineUnderTest) -> None:
    tensor = ("no.such.tensor", "float32", [2])
    with joined(engine, "first"), joined(engine, "second"), loading(engine):
        for name in ("second", "first"):
            assert outcome(engine.post(RECEIVE, bucket(name, tensor))) == (200, True, RECEIVED)


def the_number_of_a_group_of_torchs_own_is_no_name(engine: EngineUnderTest) -> None:
    reply = outcome(engine.post(INIT, group_of_its_own(engine, "0")))
    assert reply == (400, False, f"{NOT_MADE} {NAME_IN_USE}")


def a_group_that_torch_cannot_make_is_refused(engine: EngineUnderTest) -> None:
    on_cpu = engine.get("/server_info").json()["device"] == "cpu"
    for backend, problem in (("smoke", "Unknown backend type smoke"), ("nccl", "only supported with GPUs")):
        if backend == "nccl" and not on_cpu:
            continue
        status, success, text = outcome(engine.post(INIT, group_of_its_own(engine, "none") | {"backend": backend}))
        assert (status, success, text.startswith(NOT_MADE)) == (400, False, True)
        assert problem in text
        assert outcome(engine.post(DESTROY, {"group_name": "none"})) == NEVER_JOINED
    with joined(engine, "none"):
        """The name was not used up."""


def what_comes_over_a_group_is_loaded(engine: EngineUnderTest) -> None:
    before = engine.weight_version()
    body = bucket("conformance", ("no.such.tensor", "float32", [2, 3]), ("no.such.other", "bfloat16", []))
    with joined(engine, "conformance"):
        if engine.since("0.5.21"):
            assert outcome(engine.post(RECEIVE, body)) == OUTSIDE
        with loading(engine):
            assert outcome(engine.post(RECEIVE, body)) == (200, True, RECEIVED)
            body |= {"flush_cache": True, "weight_version": "conformance-2"}
            expected = (200, True, f"{RECEIVED} Weight version updated to conformance-2.")
            assert outcome(engine.post(RECEIVE, body)) == expected
            assert engine.weight_version() == "conformance-2"
    engine.post("/update_weight_version", {"new_version": before})


def a_bucket_that_cannot_be_received_is_refused(engine: EngineUnderTest) -> None:
    unaligned = bucket("conformance", ("no.such.byte", "uint8", [3]), ("no.such.tensor", "float32", [2]))
    first = "Unaligned received tensor no.such.tensor: byte offset 3, dtype torch.float32"
    later = "self.storage_offset() must be divisible by 4"
    cases = [
        (bucket("conformance"), "Cannot create empty tensor bucket"),
        (unaligned, first if engine.since("0.5.23") else later),
        (bucket("conformance", ("x", "float99", [1])), "module 'torch' has no attribute 'float99'"),
    ]
    with joined(engine, "conformance"), loading(engine):
        for body, problem in cases:
            status, success, text = outcome(engine.post(RECEIVE, body | {"weight_version": "x"}))
            assert (status, success) == (400, False)
            assert problem in text
            started = "Failed to receive weights: " if engine.since("0.5.21") else "Failed to update parameter online: "
            assert text.startswith(started)
            assert text.endswith(HALF_LOADED) is not engine.since("0.5.21")
        tensor = ("no.such.tensor", "float32", [2])
        assert outcome(engine.post(RECEIVE, bucket("conformance", tensor))) == (200, True, RECEIVED)
    assert engine.weight_version() != "x"


GROUP_CHECKS: tuple[Callable[[EngineUnderTest], None], ...] = (
    every_release_has_groups,
    calls_about_groups_have_a_schema,
    a_bucket_has_a_schema,
    a_group_that_was_never_joined_cannot_be_left,
    a_bucket_of_an_unknown_group_is_refused_since_0_5_21,
    a_group_is_joined_once_until_it_is_left,
    an_engine_is_in_several_groups_at_once,
    the_number_of_a_group_of_torchs_own_is_no_name,
    a_group_that_torch_cannot_make_is_refused,
    what_comes_over_a_group_is_loaded,
    a_bucket_that_cannot_be_received_is_refused,
)
