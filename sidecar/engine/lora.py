"""LoRA adapters in an SGLang server: loaded from memory, unloaded and named, as each release has it.

Invariant: a load is posted once. An unload may be asked for again: one that is done already is refused in other words
than one that fails, and SGLang's lock lets the second wait for the first.
"""

import base64
from collections.abc import Sequence

from sidecar import payload
from sidecar.engine.groups import GroupEngine
from sidecar.engine.sglang import again, broke
from sidecar.errors import EngineRefused
from sidecar.lora import AdapterSpec

LOAD, UNLOAD, MODELS = "/load_lora_adapter_from_tensors", "/unload_lora_adapter", "/v1/models"


class LoraEngine(GroupEngine):
    """One SGLang server that may have been started with --enable-lora."""

    async def loaded_adapters(self) -> tuple[str, ...]:
        """Names that requests can use; answered without the scheduler. Raises ``EngineError``."""
        models = (await self._looks.get(MODELS, self._timeouts.probe)).get("data") or []
        return tuple(str(model.get("id")) for model in models if model.get("parent"))  # the base model has none

    async def load_adapter(self, spec: AdapterSpec, entries: Sequence[bytes]) -> None:
        """Load one adapter: ``entries`` has one pickle per TP rank, in rank order."""
        encoded = [base64.b64encode(entry).decode() for entry in entries]
        body: dict[str, object] = {
            "lora_name": spec.name,
            "config_dict": spec.engine_config(),
            "pinned": spec.pinned,
            "load_format": payload.LOAD_FORMAT,
        }
        if self.info is None or self.info.lora_by_rank:
            body["serialized_named_tensors"] = encoded
        else:
            (body["serialized_tensors"],) = encoded
        await self._post(LOAD, body, self._timeouts.load)

    async def unload_adapter(self, name: str) -> bool:
        """Take an adapter out once the requests that use it have ended; whether it was there."""
        tries = 0

        async def post() -> None:
            nonlocal tries
            tries += 1
            await self._post(UNLOAD, {"lora_name": name}, self._timeouts.pause)

        try:
            await again(post, broke)
        except EngineRefused:
            if name in await self.loaded_adapters():
                raise
            return tries > 1  # else the first try has done it, and its answer was lost
        return True
