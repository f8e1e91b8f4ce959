"""Everything that reaches the engine is what the sidecar meant: known routes, known keys, checked payloads."""

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from sidecar.manifest import ITEM_SIZES
from tests.fakes import Call
from tests.fakes.groups import DESTROY, INIT, RECEIVE
from tests.fuzz.payload_check import check_bucket, check_replay

LOAD, LORA_LOAD = "/update_weights_from_tensor", "/load_lora_adapter_from_tensors"
GETS = {"/model_info", "/server_info", "/ready", "/v1/models"}
HEADERS = {"host", "accept", "content-type", "content-length"}
SELECTORS = {"all", "target", "draft"}
REPLAY_FORMAT = "adapter.loader.load"
KEPT_AT_MOST = 2000
PROBE = "weight-sync-probe"
"""The name of a group that no engine has: what it answers tells its release."""
LONGEST = 4096
"""Whatever is longer must not get to the engine."""


@dataclass
class Said:
    """Texts that trainers chose and that may be passed on as they are."""

    versions: dict[str, None] = field(default_factory=dict)
    adapters: dict[str, None] = field(default_factory=dict)
    folders: dict[str, None] = field(default_factory=dict)
    groups: dict[str, None] = field(default_factory=dict)
    hosts: dict[str, None] = field(default_factory=dict)

    def note(self, request: Message) -> None:
        """Remember what a request says."""
        header = getattr(request, "update", request)
        self._keep(self.versions, getattr(header, "weight_version", ""))
        self._keep(self.adapters, getattr(request, "lora_name", ""))
        self._keep(self.folders, getattr(request, "model_path", ""))
        group = getattr(request, "group", request)
        self._keep(self.groups, getattr(group, "group_name", ""))
        self._keep(self.hosts, getattr(group, "master_address", ""))

    def _keep(self, known: dict[str, None], text: str) -> None:
        if text and len(text) <= LONGEST:
            known.pop(text, None)
            known[text] = None  # the newest
            while len(known) > KEPT_AT_MOST:
                del known[next(iter(known))]


@dataclass
class BodyCheck:
    """Checks calls to one engine, as recorded by it; raises ``AssertionError`` for one that must not be."""

    tp_size: int
    by_rank: bool
    """Whether LoRA adapters come in one payload per rank."""
    model_path: str
    said: Said = field(default_factory=Said)
    num_bodies: int = 0
    num_payloads: int = 0

    def check(self, call: Call) -> None:
        """One call."""
        assert set(call.headers) <= HEADERS, f"headers {sorted(set(call.headers) - HEADERS)}"
        if call.method == "GET":
            assert call.path in GETS, f"GET {call.path!r}"
            assert not call.raw_body
            assert not call.query
            return
        assert not call.query or (call.path == "/flush_cache" and set(call.query) == {"timeout"}), f"{call.query}"
        body = json.loads(call.raw_body)
        assert json.dumps(body, separators=(",", ":")).encode() == call.raw_body, "JSON with something beside it"
        checks: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "/pause_generation": _pause,
            "/begin_weight_update": _begin,
            INIT: self._join,
            DESTROY: self._leave,
            RECEIVE: self._receive,
            "/update_weights_from_disk": self._disk,
            "/update_weight_version": self._version,
            "/unload_lora_adapter": self._unload,
            "/weights_checker": lambda body: _equal(body, {"action": "checksum"}),
            "/abort_request": lambda body: _equal(body, {"rid": "", "abort_all": True}),
            **dict.fromkeys(("/continue_generation", "/end_weight_update", "/flush_cache"), _empty),
            LOAD: self._load,
            LORA_LOAD: self._load_adapter,
        }
        assert call.path in checks, f"POST {call.path!r}"
        checks[call.path](body)
        self.num_bodies += 1

    def _disk(self, body: Mapping[str, Any]) -> None:
        fixed = {"load_format": "auto", "flush_cache": False, "abort_all_requests": False}
        assert body["model_path"] in self.said.folders or body["model_path"] == self.model_path
        _equal(body, {"model_path": body["model_path"], **fixed})

    def _version(self, body: Mapping[str, Any]) -> None:
        assert body["new_version"] in self.said.versions, f"version {body['new_version']!r} was never sent"
        _equal(body, {"new_version": body["new_version"], "abort_all_requests": False})

    def _unload(self, body: Mapping[str, Any]) -> None:
        assert body["lora_name"] in self.said.adapters
        _equal(body, {"lora_name": body["lora_name"]})

    def _load(self, body: Mapping[str, Any]) -> None:
        optional = {"selector", "weight_version"} & set(body)
        assert set(body) == {"serialized_named_tensors", "load_format", "flush_cache"} | optional
        assert body["flush_cache"] is False
        assert body.get("selector", "all") in SELECTORS
        assert "weight_version" not in body or body["weight_version"] in self.said.versions
        assert body["load_format"] in ("flattened_bucket", REPLAY_FORMAT)
        check = check_replay if body["load_format"] == REPLAY_FORMAT else check_bucket
        self._payloads(body["serialized_named_tensors"], self.tp_size, check)

    def _join(self, body: Mapping[str, Any]) -> None:
        assert set(body) == {"master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"}
        assert body["group_name"] in self.said.groups
        assert body["master_address"] in self.said.hosts
        assert 1 <= body["master_port"] <= 65535
        assert 1 <= body["rank_offset"] <= body["world_size"] - self.tp_size
        assert body["backend"] in ("gloo", "nccl")

    def _leave(self, body: Mapping[str, Any]) -> None:
        assert body["group_name"] in self.said.groups
        _equal(body, {"group_name": body["group_name"]})

    def _receive(self, body: Mapping[str, Any]) -> None:
        if body["group_name"] == PROBE:
            nothing: dict[str, Any] = {"names": [], "dtypes": [], "shapes": []}
            _equal(body, nothing | {"group_name": PROBE, "flush_cache": False})
            return
        described = {"names", "dtypes", "shapes"}
        assert set(body) - {"selector"} == described | {"group_name", "load_format", "flush_cache"}
        assert body["group_name"] in self.said.groups
        assert body["load_format"] == "flattened_bucket"
        assert body["flush_cache"] is False
        assert body.get("selector", "all") in SELECTORS
        assert len({len(body[part]) for part in described}) == 1
        assert body["names"]
        assert set(body["dtypes"]) <= set(ITEM_SIZES)

    def _load_adapter(self, body: Mapping[str, Any]) -> None:
        tensors = "serialized_named_tensors" if self.by_rank else "serialized_tensors"
        assert set(body) == {"lora_name", "config_dict", "pinned", "load_format", tensors}
        assert body["lora_name"] in self.said.adapters
        assert isinstance(body["pinned"], bool)
        assert body["load_format"] == "flattened_bucket"
        _config(body["config_dict"])
        if self.by_rank:
            self._payloads(body[tensors], self.tp_size, check_bucket)
        else:
            self._payloads([body[tensors]], 1, check_bucket)

    def _payloads(self, encoded: list[str], number: int, check: Callable[[bytes], object]) -> None:
        assert len(encoded) == number, f"{len(encoded)} payloads for {number} ranks"
        for entry in encoded:
            check(base64.b64decode(entry, validate=True))
            self.num_payloads += 1


def _config(config: Mapping[str, Any]) -> None:
    assert set(config) == {"peft_type", "r", "lora_alpha", "target_modules"}
    assert config["peft_type"] == "LORA"
    assert type(config["r"]) is int
    assert 1 <= config["r"] <= 1 << 16
    assert math.isfinite(config["lora_alpha"])
    assert config["target_modules"]
    for module in config["target_modules"]:
        assert isinstance(module, str)
        assert module.isprintable(), f"module {module!r}"


def _pause(body: Mapping[str, Any]) -> None:
    assert set(body) == {"mode"}
    assert body["mode"] in ("abort", "retract", "in_place")


def _begin(body: Mapping[str, Any]) -> None:
    assert set(body) == {"selector"}
    assert body["selector"] in SELECTORS


def _empty(body: Mapping[str, Any]) -> None:
    _equal(body, {})


def _equal(body: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert body == expected, f"{sorted(body)} instead of {sorted(expected)}"
