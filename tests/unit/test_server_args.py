"""Keyword arguments of SGLang's ServerArgs as a command line, and what is refused."""

import enum
import json
from pathlib import Path

import pytest

from adapter.server_args import check_server_args, to_argv

DECIDED = {"tp_size": 2, "nnodes": 1, "node_rank": 0}


class Backend(enum.Enum):
    TRITON = "triton"


def check(**server_args: object) -> None:
    check_server_args({"model_path": "some/model", **server_args}, DECIDED)


def test_none_and_false_are_left_out_and_true_is_a_bare_flag() -> None:
    assert to_argv({"enable_lora": True, "trust_remote_code": False, "quantization": None}) == ["--enable-lora"]


def test_values_follow_their_flag_as_text() -> None:
    given = {"mem_fraction_static": 0.5, "log_level": "info", "chat_template": Path("/a/b"), "backend": Backend.TRITON}
    assert to_argv(given) == [
        "--mem-fraction-static", "0.5", "--log-level", "info", "--chat-template", "/a/b", "--backend", "triton",
    ]  # fmt: skip


def test_lists_become_several_values_and_an_empty_one_nothing() -> None:
    assert to_argv({"cuda_graph_bs": [1, 2], "encoder_urls": ()}) == ["--cuda-graph-bs", "1", "2"]


def test_dicts_become_json() -> None:
    flag, text = to_argv({"json_model_override_args": {"num_hidden_layers": 2}})
    assert (flag, json.loads(text)) == ("--json-model-override-args", {"num_hidden_layers": 2})


def test_lora_paths_are_written_as_sglang_reads_them() -> None:
    assert to_argv({"lora_paths": {"a": "/x", "b": "/y"}}) == ["--lora-paths", "a=/x", "b=/y"]
    assert to_argv({"lora_paths": [{"lora_name": "a"}]}) == ["--lora-paths", '{"lora_name": "a"}']


def test_a_value_that_looks_like_a_flag_is_tied_to_its_own() -> None:
    assert to_argv({"watchdog_timeout": -1, "stop": "--x"}) == ["--watchdog-timeout=-1", "--stop=--x"]


def test_what_has_no_text_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^stat_loggers is a object, which cannot be written"):
        to_argv({"stat_loggers": object()})


def test_good_arguments_pass() -> None:
    check(tp_size=2, nnodes=1, node_rank=0, pp_size=1, dp_size=1, api_key=None)
    check(dp_size=2, enable_dp_attention=True)
    check_server_args({"model_path": Path("/models/x")}, DECIDED)


@pytest.mark.parametrize("model_path", [None, "", 7])
def test_a_model_path_is_needed(model_path: object) -> None:
    with pytest.raises(ValueError, match="model_path"):
        check_server_args({"model_path": model_path}, DECIDED)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"api_key": "hunter2"}, "api_key cannot be used here: the sidecar cannot show a key yet"),
        ({"admin_api_key": "hunter2"}, "admin_api_key cannot be used here"),
        ({"server_args": object()}, r"as keyword arguments instead: VerlEngine\(model_path"),
        ({"ssl_certfile": "/x"}, "plain HTTP"),
        ({"smg_grpc_mode": True}, "replaces the HTTP server"),
        ({"tp_size": 4}, "tp_size=4 contradicts the trainer's ranks, which make it 2"),
        ({"node_rank": 1}, "node_rank=1 contradicts"),
        ({"pp_size": 2}, "pp_size=2: every pipeline stage would open the same memory; use tensor parallelism"),
        ({"dp_size": 2}, "dp_size=2 makes replicas: give each its own VerlEngine"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_with_what_to_do(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        check(**given)
    assert "hunter2" not in str(refused.value)
