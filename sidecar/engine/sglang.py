"""The steps of an update, as SGLang's HTTP has them in each release.

Invariant: every call is bounded and made once, but for those that change nothing when repeated (flush, publish,
resume). Bodies always say ``flush_cache: false``: with the default, a refused flush kills releases up to 0.5.21.
"""

import asyncio
import base64
import time
from collections.abc import Sequence

from sidecar import payload
from sidecar.config import Timeouts
from sidecar.engine.http import EngineHttp
from sidecar.engine.info import Dialect, EngineInfo, parse
from sidecar.errors import EngineError, EngineRefused
from sidecar.update import PauseMode

# A refused flush is tried again at this pace: requests may be on their way out.
FLUSH_RETRY_S = 0.25
IDEMPOTENT_TRIES = 3
SESSION_ALREADY_OPEN = "already open"


class SGLangEngine:
    """One SGLang server; the coordinator's ``Engine``."""

    def __init__(self, url: str, timeouts: Timeouts) -> None:
        self._http = EngineHttp(url)
        self._timeouts = timeouts
        self.info: EngineInfo | None = None
        self.weight_version = ""
        """What answers carry, as last seen or published."""
        self.num_published = 0
        self.problem = ""
        """Why ``info`` is None, in a sentence."""
        self._paused = False

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._http.url

    async def probe(self) -> EngineInfo:
        """Ask the server what it is. Not while an update runs: /server_info waits for the scheduler."""
        self.info = parse(await self._http.get("/server_info", self._timeouts.probe))
        return self.info

    async def ask_weight_version(self) -> str:
        """What the server reports; answered without its scheduler, so at any time."""
        info = await self._http.get("/model_info", self._timeouts.probe)
        return str(info.get("weight_version") or "")

    async def pause(self, mode: PauseMode) -> None:
        """Hold generation; the mode says what happens to running requests.

        Never "abort" on top of a pause that an update that failed has left: it waits for ever for requests that cannot
        end, and blocks /continue_generation (SGLang 0.5.23, managers/tokenizer_control_mixin.py). Some pause is always
        asked for: a server that was started again meanwhile is not paused.
        """
        if self._paused and mode is PauseMode.ABORT:
            mode = PauseMode.RETRACT
        await self._http.post("/pause_generation", {"mode": mode.value}, self._timeouts.pause)
        self._paused = True

    async def begin(self) -> None:
        """Open the session, where this release has one. One that was left open is ended first."""
        if not self._dialect.uses_sessions:
            return
        try:
            await self._begin()
        except EngineRefused as refusal:
            if SESSION_ALREADY_OPEN not in refusal.message:
                raise
            await self.end()
            await self._begin()

    async def _begin(self) -> None:
        await self._http.post("/begin_weight_update", {"selector": "all"}, self._timeouts.session)

    async def load(self, entries: Sequence[bytes]) -> None:
        """Load one bucket: ``entries`` has one pickle per TP rank, in rank order."""
        body: dict[str, object] = {
            "serialized_named_tensors": [base64.b64encode(entry).decode() for entry in entries],
            "load_format": payload.LOAD_FORMAT,
            "flush_cache": False,
        }
        if self._dialect.has_selector:
            body["selector"] = "all"
        await self._http.post("/update_weights_from_tensor", body, self._timeouts.load)

    async def end(self) -> None:
        """Close the session, where this release has one: the engine finishes what it derives from the weights."""
        if self._dialect.uses_sessions:
            await self._http.post("/end_weight_update", {}, self._timeouts.session)

    async def flush(self, patience_s: float) -> bool:
        """Empty the prefix cache; False if the engine refused for ``patience_s`` because requests are in its way.

        Plain /flush_cache: its waiting form wants an idle engine, which a paused one with requests never is.
        """
        give_up = time.monotonic() + min(patience_s, self._timeouts.flush)
        while True:
            try:
                await self._http.post("/flush_cache", {}, self._timeouts.flush)
            except EngineRefused:
                if time.monotonic() + FLUSH_RETRY_S > give_up:
                    return False
                await asyncio.sleep(FLUSH_RETRY_S)
            else:
                return True

    async def publish(self, weight_version: str) -> None:
        """Set the version that answers carry; keeps requests alive (SGLang's default aborts them all)."""
        body = {"new_version": weight_version, "abort_all_requests": False}
        await self._repeatable("/update_weight_version", body, self._timeouts.publish)
        self.weight_version = weight_version
        self.num_published += 1

    async def resume(self) -> None:
        """Let generation go on."""
        await self._repeatable("/continue_generation", {}, self._timeouts.resume)
        self._paused = False

    def gone(self, why: str) -> None:
        """It cannot be reached any more: whatever comes back is a new server."""
        self.info, self.problem, self.weight_version = None, why, ""
        self._paused = False

    def close(self) -> None:
        """Let the connection go."""
        self._http.close()

    async def _repeatable(self, path: str, body: dict[str, object], timeout_s: float) -> None:
        """A call that changes nothing when repeated: a lost answer is asked for again."""
        for attempt in range(1, IDEMPOTENT_TRIES + 1):
            try:
                return await self._http.post(path, body, timeout_s)
            except EngineError:
                if attempt == IDEMPOTENT_TRIES:
                    raise
                await asyncio.sleep(FLUSH_RETRY_S)
        return None

    @property
    def _dialect(self) -> Dialect:
        assert self.info is not None, "the coordinator probes before it applies"
        return self.info.dialect
