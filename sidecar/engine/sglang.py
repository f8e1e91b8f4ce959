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
from sidecar.engine.info import DIALECTS, Dialect, EngineInfo, parse
from sidecar.errors import EngineLost, EngineRefused, EngineRestarted, EngineUnreachable, Reason
from sidecar.update import PauseMode

# A refused flush is tried again at this pace: requests may be on their way out.
RETRY_S = 0.25
IDEMPOTENT_TRIES = 3
SESSION_ALREADY_OPEN = "already open"
NO_SESSION_OPEN = "no weight-update session is open"


class SGLangEngine:
    """One SGLang server; the coordinator's ``Engine``."""

    def __init__(self, url: str, timeouts: Timeouts) -> None:
        self._steps = EngineHttp(url)
        self._looks = EngineHttp(url)  # of its own, so that a long load hides nothing
        self._timeouts = timeouts
        self.info: EngineInfo | None = None
        self.epoch = 0
        """How many lives of the server were seen: counts up whenever another one answers than before."""
        self.weight_version = ""
        """What answers carry, as last seen or published."""
        self.problem = ""
        """Why ``info`` is None, in a sentence."""
        self.suspect = False
        """Whether a step got no answer, so that the server may be another one by now."""
        self._num_published = 0
        self._publishing = ""
        """The version that was published last, or is being: the server may have it before its answer is here."""
        self._last_info: EngineInfo | None = None
        self._paused = False
        self._bound: tuple[int, Dialect] = (0, DIALECTS[0])
        """The epoch that the update in hand began with, and the rules it follows."""

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._steps.url

    async def probe(self) -> EngineInfo:
        """Ask the server what it is, and notice if it is another one than before; raises ``EngineError``."""
        published, self.suspect = self._num_published, False  # a step that is lost meanwhile asks for another look
        info = parse(await self._looks.get("/server_info", self._timeouts.probe))
        version = await self._ask_weight_version()
        old_answer = self._num_published != published
        if info != self._last_info or not (old_answer or version in (self.weight_version, self._publishing)):
            self.epoch += 1
            self._paused = False
            self.weight_version = version
        self.info = self._last_info = info
        return info

    async def look(self) -> None:
        """See that the server is there and what it serves; answered without its scheduler, so at any time."""
        published = self._num_published
        version = await self._ask_weight_version()
        if self._num_published == published:  # otherwise the answer may be older than what is known
            self.weight_version = version

    async def _ask_weight_version(self) -> str:
        info = await self._looks.get("/model_info", self._timeouts.probe)
        return str(info.get("weight_version") or "")

    def gone(self, why: str) -> None:
        """It does not answer: whether what comes back is the same server is seen by the next ``probe``."""
        self.info, self.problem = None, why

    def died(self) -> None:
        """That server is no more: whoever answers next is another, even with the same seed and version."""
        self._last_info = None

    def assume_paused(self) -> None:
        """A predecessor of this process has paused the server."""
        self._paused = True

    async def pause(self, mode: PauseMode) -> None:
        """Hold generation; the mode says what happens to running requests.

        Never "abort" on top of a pause that an update that failed has left: it waits for ever for requests that cannot
        end, and blocks /continue_generation (SGLang 0.5.23, managers/tokenizer_control_mixin.py). Some pause is always
        asked for: a server that was started again meanwhile is not paused.
        """
        if self.info is None or self._last_info is None:
            message = self.problem or f"the engine at {self.url} has just gone; is the SGLang server up?"
            raise EngineUnreachable(Reason.ENGINE_UNREACHABLE, message, engineUrl=self.url)
        self._bound = (self.epoch, self.info.dialect)
        if self._paused and mode is PauseMode.ABORT:
            mode = PauseMode.RETRACT
        self._paused = True  # even if its answer is lost
        await self._post("/pause_generation", {"mode": mode.value}, self._timeouts.pause)

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
        await self._post("/begin_weight_update", {"selector": "all"}, self._timeouts.session)

    async def load(self, entries: Sequence[bytes]) -> None:
        """Load one bucket: ``entries`` has one pickle per TP rank, in rank order."""
        body: dict[str, object] = {
            "serialized_named_tensors": [base64.b64encode(entry).decode() for entry in entries],
            "load_format": payload.LOAD_FORMAT,
            "flush_cache": False,
        }
        if self._dialect.has_selector:
            body["selector"] = "all"
        await self._post("/update_weights_from_tensor", body, self._timeouts.load)

    async def end(self) -> None:
        """Close the session, where this release has one: the engine finishes what it derives from the weights."""
        if self._dialect.uses_sessions:
            await self._post("/end_weight_update", {}, self._timeouts.session)

    async def end_if_open(self) -> None:
        """Close a session that may have been opened; any other refusal than that none is open is an error."""
        try:
            await self.end()
        except EngineRefused as refusal:
            if NO_SESSION_OPEN not in refusal.message:
                raise

    async def flush(self, patience_s: float) -> bool:
        """Empty the prefix cache; False if the engine refused for ``patience_s`` because requests are in its way.

        Plain /flush_cache: its waiting form wants an idle engine, which a paused one with requests never is.
        """
        give_up = time.monotonic() + min(patience_s, self._timeouts.flush)
        while True:
            try:
                await self._post("/flush_cache", {}, self._timeouts.flush)
            except EngineRefused:
                if time.monotonic() + RETRY_S > give_up:
                    return False
                await asyncio.sleep(RETRY_S)
            else:
                return True

    async def publish(self, weight_version: str) -> None:
        """Set the version that answers carry; keeps requests alive (SGLang's default aborts them all)."""
        body = {"new_version": weight_version, "abort_all_requests": False}
        self._publishing = weight_version
        await self._repeatable("/update_weight_version", body, self._timeouts.publish)
        self.weight_version = weight_version
        self._num_published += 1

    async def resume(self) -> None:
        """Let generation go on."""
        await self._repeatable("/continue_generation", {}, self._timeouts.resume)
        self._paused = False

    def close(self) -> None:
        """Let the connections go."""
        self._steps.close()
        self._looks.close()

    async def _repeatable(self, path: str, body: dict[str, object], timeout_s: float) -> None:
        """A call that changes nothing when repeated: a lost or bad answer is asked for again."""
        for _ in range(IDEMPOTENT_TRIES - 1):
            try:
                return await self._post(path, body, timeout_s)
            except (EngineLost, EngineRefused):
                await asyncio.sleep(RETRY_S)
        return await self._post(path, body, timeout_s)

    async def _post(self, path: str, body: dict[str, object], timeout_s: float) -> None:
        """A step of the update in hand, for the very server that it began with."""
        if self.epoch != self._bound[0] or self._last_info is None:
            message = f"the engine at {self.url} was restarted during the update and has lost what was loaded; "
            message += "send the update again"
            raise EngineRestarted(Reason.ENGINE_RESTARTED, message, engineUrl=self.url)
        try:
            await self._steps.post(path, body, timeout_s)
        except (EngineLost, EngineUnreachable):
            self.suspect = True
            raise

    @property
    def _dialect(self) -> Dialect:
        return self._bound[1]
