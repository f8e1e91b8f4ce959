"""One life of a scripted engine: from its start to its death, what each request does to it and gets.

Two locks stand where SGLang has them. What needs the scheduler runs one at a time and holds up the rest, as a load
does; requests in flight have their own (``Generation``). A client that goes away changes nothing.

Invariant: after ``kill`` no call returns; each raises ``EngineDied``.
"""

import itertools
import random
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes import payloads
from tests.fakes.calls import Call, Reply, json_reply, outcome, text_reply
from tests.fakes.dialects import EngineDialect
from tests.fakes.faults import EngineDied, Fault
from tests.fakes.generation import Generation
from tests.fakes.groups import DESTROY, INIT, RECEIVE, RECEIVED, NotReceived, UpdateGroups
from tests.fakes.lora import LOAD, MODELS, UNLOAD, LoraPool
from tests.fakes.payloads import Entry
from tests.fakes.replay import LOADER, FakeLoaders, ReplayScript
from tests.fakes.weights import Weights, decode_all, unpickle_all

FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
FLUSH_FAILED = "Flush cache failed.\n"
FLUSH_TIMED_OUT = "Timed out waiting for idle state."
NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or queued. "
    "Retract or finish them, then call /flush_cache."
)
SESSION_OPEN = "a weight-update session is already open; call end_weight_update() first"
NO_SESSION = "no weight-update session is open; call begin_weight_update() first"
NO_GPU = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
NO_LOADER = "Failed to get model loader: <sglang.srt.model_loader.loader.DummyModelLoader object at 0x7f00>."
NO_PROMPT = "Either text, input_ids or input_embeds should be provided."


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the engine was started with."""

    dialect: EngineDialect
    tp_size: int
    device: str
    token_s: float
    """Time that one generated token takes."""
    checkpoint: Mapping[str, str]
    """The weights after a start: name -> digest."""
    known_names: Collection[str] | None
    """Names that the model has; None takes any."""
    custom_loaders: Collection[str]
    replay: ReplayScript
    """How the replay loader behaves, where it is one of them."""
    server_info: Mapping[str, object]
    """Added to /server_info last."""
    without_routes: Collection[str] = ()
    """Paths that it does not have."""


class EngineLife:
    """State and behaviour of one engine process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dialect = settings.dialect
        self._scheduler = threading.Lock()
        self._request_ids = itertools.count()
        self.seed = random.randrange(2**30)
        self.weights = Weights(settings.tp_size, settings.checkpoint, settings.known_names)
        self.weight_version = "default"
        self.model_path = str(settings.server_info.get("model_path", "/models/tiny-qwen3"))
        self.load_format = str(settings.server_info.get("load_format", "auto"))
        self.session_open = False
        self.generation = Generation()
        self.lora = LoraPool(settings.dialect, settings.tp_size, settings.server_info, settings.device)
        self.groups = UpdateGroups(settings.dialect, settings.device)
        self.loaders = FakeLoaders(settings.replay)
        self.dead = threading.Event()
        self._gets: dict[str, Callable[[Call], Reply]] = {
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/flush_cache": self._flush_cache,
            "/weights_checker": self._weights_checker,
            "/health": self._healthy,
            "/openapi.json": self._openapi,
            MODELS: self.lora.models,
        }
        self._posts: dict[str, Callable[[Call], Reply]] = {
            "/pause_generation": self._pause_generation,
            "/continue_generation": self._continue_generation,
            "/update_weights_from_tensor": self._update_weights_from_tensor,
            INIT: self.groups.init,
            DESTROY: self.groups.destroy,
            RECEIVE: self._update_weights_from_distributed,
            "/update_weights_from_disk": self._update_weights_from_disk,
            "/update_weight_version": self._update_weight_version,
            "/flush_cache": self._flush_cache,
            "/weights_checker": self._weights_checker,
            "/abort_request": self._abort_request,
            "/generate": self._generate,
            LOAD: self.lora.load,
            UNLOAD: self.lora.unload,
        }
        if self._dialect.has_sessions:
            self._posts["/begin_weight_update"] = self._begin_weight_update
            self._posts["/end_weight_update"] = self._end_weight_update
        if self._dialect.has_ready:
            self._gets["/ready"] = self._ready
        for path in settings.without_routes:
            self._gets.pop(path, None)
            self._posts.pop(path, None)

    def _openapi(self, _: Call) -> Reply:
        """What FastAPI says of itself; of a path, only that it is there."""
        return json_reply(200, {"paths": {path: {} for path in (*self._gets, *self._posts)}})

    def kill(self) -> None:
        """End this life; whoever waits in it gets ``EngineDied``."""
        self.dead.set()
        self.generation.kill()
        self.lora.kill()

    def route(self, call: Call) -> Callable[[Call], Reply] | Reply:
        """What answers this call, or the reply if nothing does."""
        routes = {"GET": self._gets, "POST": self._posts}.get(call.method, {})
        if call.path in routes:
            return routes[call.path]
        exists = call.path in self._gets or call.path in self._posts
        return json_reply(405, {"detail": "Method Not Allowed"}) if exists else json_reply(404, {"detail": "Not Found"})

    def act(self, call: Call, route: Callable[[Call], Reply], before: Callable[[], None], fault: Fault | None) -> Reply:
        """Do what the call asks for. ``before`` runs when its turn has come; it may wait and may kill."""
        if call.path in (LOAD, UNLOAD):
            return self.lora.act(call, lambda: self._scheduled(call, route, before, fault))
        if call.path in ("/generate", "/model_info", "/get_model_info", "/health", "/ready", "/openapi.json", MODELS):
            before()
            reply = route(call)
            self._check_alive()
            return reply
        self.generation.make_way(call)
        return self._scheduled(call, route, before, fault)

    def _scheduled(
        self, call: Call, route: Callable[[Call], Reply], before: Callable[[], None], fault: Fault | None
    ) -> Reply:
        with self._scheduler:
            self._check_alive()
            before()
            self._check_alive()
            if call.path in ("/update_weights_from_tensor", RECEIVE) and fault in (Fault.HALF_LOAD, Fault.SKIP_HALF):
                return self._half_load(call, fault)
            return route(call)

    def _check_alive(self) -> None:
        if self.dead.is_set():
            raise EngineDied

    def _model_info(self, _call: Call) -> Reply:
        now = {"model_path": self.model_path, "weight_version": self.weight_version}
        if not self._dialect.server_info_follows_the_disk:
            now["load_format"] = self.load_format
        return json_reply(200, self._dialect.model_info() | now)

    def _server_info(self, _call: Call) -> Reply:
        started_with: dict[str, object] = {
            "tp_size": self._settings.tp_size,
            "device": self._settings.device,
            "random_seed": self.seed,
            "weight_version": "default",
            "model_path": "/models/tiny-qwen3",
            "load_format": "auto",
            "custom_weight_loader": list(self._settings.custom_loaders),
            "internal_states": [{"weight_version": self.weight_version}],
        }
        started_with |= self._settings.server_info
        if self._dialect.server_info_follows_the_disk:
            started_with |= {"model_path": self.model_path, "load_format": self.load_format}
        return json_reply(200, self._dialect.server_info() | started_with)

    def _healthy(self, _call: Call) -> Reply:
        return text_reply(200, "")

    def _ready(self, _call: Call) -> Reply:
        return text_reply(503 if self.generation.paused else 200, "")

    def _pause_generation(self, call: Call) -> Reply:
        self.generation.pause(call.body.get("mode", "abort"))
        return json_reply(200, {"message": "Generation paused successfully.", "status": "ok"})

    def _continue_generation(self, _call: Call) -> Reply:
        self.generation.resume()
        return json_reply(200, {"message": "Generation continued successfully.", "status": "ok"})

    def _begin_weight_update(self, _call: Call) -> Reply:
        if self.session_open:
            return outcome(False, SESSION_OPEN)
        self.session_open = True
        return outcome(True, "Success")

    def _end_weight_update(self, _call: Call) -> Reply:
        if not self.session_open:
            return outcome(False, NO_SESSION)
        self.session_open = False
        return outcome(True, "Success")

    def _update_weights_from_tensor(self, call: Call) -> Reply:
        return self._load(call, every=1)

    def _half_load(self, call: Call, fault: Fault) -> Reply:
        load = self._receive if call.path == RECEIVE else self._load
        reply = load(call, every=2)
        if fault is Fault.HALF_LOAD:
            raise EngineDied
        return reply

    def _load(self, call: Call, every: int) -> Reply:
        if refusal := self._outside_session("update_weights_from_tensor"):
            return refusal
        call.entries = entries = self._decode(call.body)
        self.weights.load(entries, every)
        for entry in entries:
            payloads.release(entry)
        return self._loaded(call.body)

    def _decode(self, body: Mapping[str, Any]) -> tuple[Entry, ...]:
        """An exception while loading ends the scheduler, and the scheduler ends the server."""
        encoded, load_format = body["serialized_named_tensors"], body.get("load_format")
        try:
            if load_format == LOADER and load_format in self._settings.custom_loaders:
                return self.loaders.load(unpickle_all(encoded, self._settings.tp_size))
            return decode_all(encoded, self._settings.tp_size, load_format, self._settings.custom_loaders)
        except Exception as death:
            raise EngineDied(f"{type(death).__name__}: {death}") from death

    def _loaded(self, body: Mapping[str, Any], success: str = "Success") -> Reply:
        """Flush if asked to, then take the version over."""
        if body.get("flush_cache", True) and not self._can_flush():
            if self._dialect.refused_flush_is_fatal:
                raise EngineDied("Cache flush failed after updating weights")
            return outcome(False, NOT_FLUSHED)
        version = body.get("weight_version")
        if version is None:
            return outcome(True, success)
        self.weight_version = version
        return outcome(True, f"{success} Weight version updated to {version}.")

    def _update_weights_from_distributed(self, call: Call) -> Reply:
        return self._receive(call, every=1)

    def _receive(self, call: Call, every: int) -> Reply:
        if refusal := self._outside_session("update_weights_from_distributed"):
            return refusal
        try:
            self.weights.receive(self.groups.receive(call.body), every)
        except NotReceived as problem:
            return outcome(False, str(problem))
        return self._loaded(call.body, RECEIVED)

    def _update_weights_from_disk(self, call: Call) -> Reply:
        """Needs no session. A folder stands for content of its own: every tensor that the model has gets it.

        A server that was started with random weights goes on with them unless a format is named.
        """
        path, load_format = call.body["model_path"], call.body.get("load_format") or self.load_format
        if load_format == "dummy":
            return self._from_disk(False, NO_LOADER)
        if not Path(path).is_dir():
            return self._from_disk(False, f"Failed to get weights iterator: {path} is not a folder.")
        self.weights.load_from_disk(path)
        self.model_path, self.load_format = path, load_format
        return self._from_disk(True, "Succeeded to update model weights.")

    @staticmethod
    def _from_disk(success: bool, message: str) -> Reply:
        content = {"success": success, "message": message, "num_paused_requests": 0}
        return json_reply(200 if success else 400, content)

    def _outside_session(self, name: str) -> Reply | None:
        if self.session_open or not self._dialect.has_sessions:
            return None
        return outcome(False, f"{name} must run between begin_weight_update() and end_weight_update()")

    def _update_weight_version(self, call: Call) -> Reply:
        self.weight_version = version = call.body["new_version"]
        message = f"Weight version updated to {version}"
        return json_reply(200, {"success": True, "message": message, "new_version": version})

    def _flush_cache(self, call: Call) -> Reply:
        if float(call.query.get("timeout", 0)) > 0:
            idle = self.generation.is_idle()
            return text_reply(200, FLUSHED) if idle else text_reply(400, FLUSH_TIMED_OUT)
        return text_reply(200, FLUSHED) if self._can_flush() else text_reply(400, FLUSH_FAILED)

    def _can_flush(self) -> bool:
        paused = self.generation.scheduler_paused
        return self.generation.is_idle(ignore_waiting=paused and not self._dialect.waiting_blocks_flush)

    def _weights_checker(self, call: Call) -> Reply:
        action = (call.body or {}).get("action", "checksum")
        if action != "checksum":
            return outcome(False, f"Unsupported action={action!r}")
        if self._settings.device == "cpu" and not self._dialect.checksums_on_cpu:
            return outcome(False, NO_GPU)
        content: dict[str, object] = {"success": True, "message": "Success."}
        content["ranks"] = [self._rank_checksums(rank) for rank in range(self._settings.tp_size)] * self._num_answers()
        if self._dialect.has_engine_checksum:
            content["per_engine_checksum"] = self.weights.checksum()
        return json_reply(200, content)

    def _num_answers(self) -> int:
        """Under DP attention each replica's first rank answers, for all TP ranks."""
        info = self._settings.server_info
        replicas = info.get("attn_dp_size", info.get("dp_size", 1))
        return int(str(replicas)) if info.get("enable_dp_attention") else 1

    def _rank_checksums(self, rank: int) -> dict[str, object]:
        size = self._settings.tp_size
        place: dict[str, object] = {"tp_rank": rank, "tp_size": size, "rank": rank, "size": size}
        place |= {"dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}
        checksum = self.weights.rank_checksum(rank)
        checksums = dict(self.weights.ranks[rank])
        places = [{"role": "target"} | place] if self._dialect.places_by_role else place
        return {"checksums": checksums, "per_gpu_checksum": checksum, "parallelism_info": places}

    def _abort_request(self, call: Call) -> Reply:
        if (call.body or {}).get("abort_all"):
            self.generation.abort_all()
        return text_reply(200, "")

    def _generate(self, call: Call) -> Reply:
        body = call.body or {}
        prompt = body.get("input_ids") or list(str(body.get("text", "")).encode())
        if not prompt:
            return json_reply(400, {"error": {"message": NO_PROMPT}})
        name = body.get("lora_path")
        if name is not None and name not in self.lora.loaded:
            return json_reply(
                400, {"error": {"message": f"The following requested LoRA adapters are not loaded: {name}"}}
            )
        wanted = int(body.get("sampling_params", {}).get("max_new_tokens", 128))
        began_with = self.weight_version
        with self.lora.used(name) as adapted:
            number = wanted if self.generation.decode(wanted * self._settings.token_s) else 0
            with self._scheduler:
                tokens = self.weights.tokens(prompt, number, adapted)
                meta = self._meta_info(len(prompt), number, began_with)
        return json_reply(200, {"output_ids": tokens, "meta_info": meta})

    def _meta_info(self, num_prompt: int, number: int, began_with: str) -> dict[str, object]:
        finish = {"type": "length", "length": number} if number else {"type": "abort", "message": "Abort"}
        info: dict[str, object] = {
            "id": f"{next(self._request_ids):032x}",
            "finish_reason": finish,
            "prompt_tokens": num_prompt,
            "completion_tokens": number,
            "cached_tokens": 0,
            "weight_version": self.weight_version,
        }
        if self._dialect.has_version_spans:
            info["weight_versions"] = _spans(began_with, self.weight_version, number)
        return info


def _spans(began_with: str, ended_with: str, number: int) -> list[dict[str, object]]:
    """Which tokens were made by which version: where it changed, it changed half-way."""
    if began_with == ended_with:
        return [{"version": ended_with, "start": 0, "end": number}]
    half = number // 2
    before = {"version": began_with, "start": 0, "end": half}
    return [before, {"version": ended_with, "start": half, "end": number}]
