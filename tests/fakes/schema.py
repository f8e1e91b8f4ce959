"""Which bodies SGLang accepts, and how it says no: pydantic's errors, with the whole input echoed."""

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.fakes.calls import Call, Reply, json_reply

Body = Mapping[str, Any]
Check = Callable[[Any], str]
"""What is wrong with a value, in pydantic's words; empty if nothing is."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body. Fields that are not listed are ignored, as SGLang ignores them."""

    check: Check
    required: bool = False


def _is_a(kind: type, name: str, or_none: bool = False) -> Check:
    return lambda value: (
        "" if isinstance(value, kind) or (or_none and value is None) else f"Input should be a valid {name}"
    )


def _one_of(*choices: str) -> Check:
    return lambda value: "" if value in choices else f"Input should be {' or '.join(map(repr, choices))}"


def _list_of(check: Check) -> Check:
    def problem(value: Any) -> str:
        if not isinstance(value, list):
            return "Input should be a valid list"
        return next(filter(None, map(check, value)), "")

    return problem


def _base64_list(value: Any) -> str:
    if not isinstance(value, list):
        return "Input should be a valid list"
    try:
        for entry in value:
            base64.b64decode(entry, validate=True)
    except (binascii.Error, TypeError, ValueError):
        return "Value error, Expected base64-encoded bytes"
    return ""


_BOOL = Field(_is_a(bool, "boolean"))
_TEXT = Field(_is_a(str, "string"))
_NEEDED_TEXT = Field(_is_a(str, "string"), required=True)
_NEEDED_NUMBER = Field(_is_a(int, "integer"), required=True)
_TEXTS = Field(_list_of(_is_a(str, "string")), required=True)
_SHAPES = Field(_list_of(_list_of(_is_a(int, "integer"))), required=True)
_TEXT_OR_NONE = Field(_is_a(str, "string", or_none=True))
_SELECTOR = {"selector": Field(_one_of("target", "draft", "all"))}
_UPDATE = {"flush_cache": _BOOL, "abort_all_requests": _BOOL, "weight_version": _TEXT_OR_NONE}
_BODIES: dict[str, dict[str, Field]] = {
    "/pause_generation": {"mode": Field(_one_of("abort", "retract", "in_place"))},
    "/continue_generation": {"torch_empty_cache": _BOOL},
    "/begin_weight_update": _SELECTOR,
    "/end_weight_update": {},
    "/update_weights_from_tensor": {
        "serialized_named_tensors": Field(_base64_list, required=True),
        "load_format": _TEXT_OR_NONE,
        **_UPDATE,
    },
    "/init_weights_update_group": {
        "master_address": _NEEDED_TEXT,
        "master_port": _NEEDED_NUMBER,
        "rank_offset": _NEEDED_NUMBER,
        "world_size": _NEEDED_NUMBER,
        "group_name": _TEXT,
        "backend": _TEXT,
    },
    "/destroy_weights_update_group": {"group_name": _TEXT},
    "/update_weights_from_distributed": {
        "names": _TEXTS,
        "dtypes": _TEXTS,
        "shapes": _SHAPES,
        "group_name": _TEXT,
        "load_format": _TEXT_OR_NONE,
        **_UPDATE,
    },
    "/update_weights_from_disk": {
        "model_path": _NEEDED_TEXT,
        "load_format": _TEXT_OR_NONE,
        **_UPDATE,
    },
    "/load_lora_adapter_from_tensors": {
        "lora_name": _NEEDED_TEXT,
        "config_dict": Field(_is_a(dict, "dictionary"), required=True),
        "load_format": _TEXT_OR_NONE,
        "pinned": _BOOL,
    },
    "/unload_lora_adapter": {"lora_name": _NEEDED_TEXT},
    "/update_weight_version": {"new_version": _NEEDED_TEXT, "abort_all_requests": _BOOL},
}


_LORA_TENSORS = {
    True: {"serialized_named_tensors": Field(_base64_list, required=True)},
    False: {"serialized_tensors": _NEEDED_TEXT},
}


def complaint(call: Call, has_selector: bool, lora_by_rank: bool) -> Reply | None:
    """The 400 for a body that does not fit its path; None if it does or the path takes any."""
    fields = _BODIES.get(call.path)
    if fields is None:
        return None
    if has_selector and call.path.startswith("/update_weights"):
        fields = fields | _SELECTOR
    if call.path == "/load_lora_adapter_from_tensors":
        fields = fields | _LORA_TENSORS[lora_by_rank]
    problem = _problem(call, fields)
    return _schema_error(call.path, problem) if problem else None


def _problem(call: Call, fields: Mapping[str, Field]) -> dict[str, Any] | None:
    if not call.raw_body:
        return {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}
    media_type = call.headers.get("content-type", "").partition(";")[0]
    body = call.body if media_type == "application/json" else call.raw_body
    if body is None:
        return {"type": "json_invalid", "loc": ("body", 1), "msg": "JSON decode error", "input": {}}
    if not isinstance(body, dict):
        return {"type": "dict_type", "loc": ("body",), "msg": "Input should be a valid dictionary", "input": body}
    return _field_problem(body, fields)


def _field_problem(body: Body, fields: Mapping[str, Field]) -> dict[str, Any] | None:
    for name, field in fields.items():
        if name not in body:
            if field.required:
                return {"type": "missing", "loc": ("body", name), "msg": "Field required", "input": body}
        elif message := field.check(body[name]):
            return {"type": "value_error", "loc": ("body", name), "msg": message, "input": body[name]}
    return None


def _schema_error(path: str, problem: dict[str, Any]) -> Reply:
    message = f"1 validation error:\n  {problem}\n\n    POST {path} [{problem}]"
    content = {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}
    return json_reply(400, content)
