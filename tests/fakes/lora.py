"""The scripted engine's LoRA adapters: SGLang's registry of names, its one lock, and what an adapter does to answers.

As on a real CPU server (0.5.15.post1 to 0.5.23): an adapter goes on to live in the memory that it came in, until it is
unloaded; an unload takes the name at once and waits for requests that use it, and other calls about adapters wait
behind it; what SGLang does not check when it loads kills the server when a request first names it.
"""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.fakes import payloads
from tests.fakes.calls import Call, Reply, json_reply
from tests.fakes.dialects import EngineDialect
from tests.fakes.faults import EngineDied
from tests.fakes.payloads import Entry, LoadedTensor
from tests.fakes.weights import decode_all

LOAD, UNLOAD, MODELS = "/load_lora_adapter_from_tensors", "/unload_lora_adapter", "/v1/models"
NOT_ENABLED = "LoRA is not enabled. Please set `--enable-lora` to enable LoRA."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One that is loaded."""

    config: Mapping[str, Any]
    entries: tuple[Entry, ...]

    def check_servable(self) -> None:
        """Raise what a real scheduler dies of when a batch first needs this adapter."""
        factors: dict[str, dict[str, LoadedTensor]] = {}
        for tensor in self.entries[0].tensors:
            found = _FACTOR.fullmatch(tensor.name)
            if found is None:
                raise EngineDied(f"{tensor.name} is taken for a factor")
            factors.setdefault(found["module"], {})[found["factor"]] = tensor
        for module, pair in factors.items():
            if set(pair) != {"A", "B"} or {pair["A"].shape[0], pair["B"].shape[1]} != {self.config["r"]}:
                raise EngineDied(f"LoRA buffer shape does not match weight shape: {module}")

    def digest(self) -> str:
        """Of all its tensors, on all ranks."""
        return " ".join(f"{tensor.name} {tensor.digest()}" for entry in self.entries for tensor in entry.tensors)


class LoraPool:
    """What one engine life serves beside its model."""

    def __init__(self, dialect: EngineDialect, tp_size: int, server_info: Mapping[str, object], device: str) -> None:
        self._dialect = dialect
        self._tp_size = tp_size
        self._info = server_info
        self._device = device
        self._update_lock = threading.Lock()
        self._changed = threading.Condition()
        self._in_use: Counter[str] = Counter()
        self._dead = False
        self._retired: Adapter | None = None
        self.loaded: dict[str, Adapter] = {}

    @property
    def enabled(self) -> bool:
        return bool(self._info.get("enable_lora"))

    def kill(self) -> None:
        """Wake who waits for requests, with ``EngineDied``. Counts of memory stay as they are, as after a SIGKILL."""
        with self._changed:
            self._dead = True
            self._changed.notify_all()

    def act(self, call: Call, work: Callable[[], Reply]) -> Reply:
        """One call about adapters at a time. ``work`` needs the scheduler and is told nothing."""
        if not self.enabled:
            return self._reply(False, NOT_ENABLED)
        with self._update_lock:
            if call.path == UNLOAD and (refusal := self._retire(call.body["lora_name"])):
                return refusal
            return work()

    def load(self, call: Call) -> Reply:
        body = call.body
        encoded = body["serialized_named_tensors"] if self._dialect.lora_by_rank else [body["serialized_tensors"]]
        call.entries = entries = self._decode(encoded, body.get("load_format"))
        name, config = body["lora_name"], body["config_dict"]
        if problem := self._problem(name, config):
            self._drop(Adapter(config, entries))
            return self._reply(False, problem)
        self.loaded[name] = Adapter(config, entries)
        if self._device != "cpu":
            self._drop(self.loaded[name])
        return self._reply(True, "")

    def unload(self, _call: Call) -> Reply:
        """The name is no longer served, and nobody uses it."""
        if self._retired and self._device == "cpu":
            self._drop(self._retired)
        self._retired = None
        return self._reply(True, "")

    def models(self, _call: Call) -> Reply:
        base = "/models/tiny-qwen3"
        models = [{"id": base, "root": base, "parent": None}]
        models += [{"id": name, "root": "__tensor__", "parent": base} for name in self.loaded]
        return json_reply(200, {"object": "list", "data": models})

    @contextmanager
    def used(self, name: str | None) -> Iterator[str]:
        """A request's adapter while it runs: what it adds to the weights. ``KeyError`` if there is none."""
        if name is None:
            yield ""
            return
        adapter = self.loaded[name]
        adapter.check_servable()
        with self._counted(name):
            yield adapter.digest()

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        with self._changed:
            self._in_use[name] += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_use[name] -= 1
                self._changed.notify_all()

    def _retire(self, name: str) -> Reply | None:
        if name not in self.loaded:
            return self._reply(False, f"LoRA with name {name} does not exist. Loaded LoRAs: {list(self.loaded)}")
        self._retired = self.loaded.pop(name)
        with self._changed:
            self._changed.wait_for(lambda: self._dead or not self._in_use[name])
        if self._dead:
            raise EngineDied
        return None

    def _problem(self, name: str, config: Mapping[str, Any]) -> str:
        if name in self.loaded:
            return f"Failed to load LoRA adapter {name} because it is already loaded"
        if config["r"] > int(str(self._info.get("max_lora_rank", 8))):
            return f"LoRA adapter {name} with rank {config['r']} is incompatible with the current LoRA memory pool"
        return ""

    def _decode(self, encoded: Sequence[str], load_format: str | None) -> tuple[Entry, ...]:
        try:
            return decode_all(encoded, self._tp_size, load_format, ())
        except Exception as death:
            raise EngineDied(f"{type(death).__name__}: {death}") from death

    def _drop(self, adapter: Adapter) -> None:
        for entry in adapter.entries:
            payloads.release(entry)

    def _reply(self, success: bool, message: str) -> Reply:
        content: dict[str, object] = {"rid": None, "http_worker_ipc": None, "success": success}
        refused_early = message == NOT_ENABLED or "does not exist" in message
        names = None if refused_early else dict.fromkeys(self.loaded, "__tensor__")
        content |= {"error_message": message, "loaded_adapters": names}
        return json_reply(200 if success else 400, content)
