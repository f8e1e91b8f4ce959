"""What is seen of one SGLang server from outside: whether it is there, what it is, what it serves, and its lives.

Invariant: ``epoch`` counts up whenever another server may be answering than before. That is told by what HTTP shows
(``random_seed``, new at every start unless it was set; a weight_version that is not ours), by a refused connection,
and, where this host shows it, by the process that listens at the port.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from sidecar.config import EngineKeys, Timeouts
from sidecar.engine import gpus
from sidecar.engine.http import EngineHttp
from sidecar.engine.info import NEWEST_KNOWN, EngineInfo, missing_routes, parse
from sidecar.engine.listener import is_alive, listener_of
from sidecar.errors import EngineError

logger = logging.getLogger(__name__)

TAKES_NO_REQUESTS = 503
"""What /ready answers while the server starts or is paused; anything but that says nothing about a pause."""


class EngineLife:
    """One server's address, and the lives of what answers there."""

    def __init__(
        self, url: str, timeouts: Timeouts, gpu_uuids: Sequence[str] = (), keys: EngineKeys | None = None
    ) -> None:
        self._looks = EngineHttp(url, keys)  # of its own, so that a long load hides nothing
        self._timeouts = timeouts
        self._gpu_uuids = tuple(gpu_uuids)
        """What its operator says; empty: nothing."""
        self.info: EngineInfo | None = None
        self.epoch = 0
        """How many lives of the server were seen: counts up whenever another one answers than before."""
        self.weight_version = ""
        """What answers carry, as last seen or published."""
        self.problem = ""
        """Why ``info`` is None, in a sentence."""
        self.suspect = False
        """Whether a step got no answer, so that the server may be another one by now."""
        self.held = False
        """Whether it takes no requests: it starts, or is paused. Shown by SGLang 0.5.20 and later."""
        self._last_info: EngineInfo | None = None
        self._num_published = 0
        self._publishing = ""
        """The version that was published last, or is being: the server may have it before its answer is here."""
        self._num_resumed = 0
        self._paused = False

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._looks.url

    async def probe(self) -> EngineInfo:
        """Ask the server what it is, and notice if it is another one than before; raises ``EngineError``.

        The answer comes from the scheduler, so whatever was posted before has been dealt with by then.
        """
        published, self.suspect = self._num_published, False  # a step that is lost meanwhile asks for another look
        process = await asyncio.to_thread(listener_of, self.url)
        described = await self._looks.get("/server_info", self._timeouts.probe)
        info = await asyncio.to_thread(gpus.seen, replace(parse(described), process=process), self._gpu_uuids)
        if info.is_unknown:
            info = await self._asked_for_routes(info)
        version = await self.ask_weight_version()
        old_answer = self._num_published != published
        if self._is_another(info) or not (old_answer or version in (self.weight_version, self._publishing)):
            self.epoch += 1
            self._paused = False
            self.weight_version = version
        elif self._last_info:  # what it was started with; some releases name what they loaded since
            info = replace(info, model_path=self._last_info.model_path)
        self.info = self._last_info = info
        await self._look_whether_held()
        return info

    async def _asked_for_routes(self, info: EngineInfo) -> EngineInfo:
        """Of a release that nobody knows here: refused if it says that it lacks something, warned about in any case."""
        newer = f"SGLang {info.version} is newer than {NEWEST_KNOWN}, the newest that this sidecar was run with"
        try:
            missing = missing_routes(info, await self._looks.get("/openapi.json", self._timeouts.probe))
        except EngineError as error:
            logger.warning("%s, and does not say what it can do: %s", newer, error.message)
            return info
        if missing:
            problem = f"{newer}, and has no {', '.join(missing)}; upgrade the sidecar"
            logger.warning("%s", problem)
            return replace(info, unsupported=problem)
        logger.warning("%s; it has the routes of %s, whose rules are followed", newer, info.dialect.name)
        return info

    async def look(self) -> None:
        """See that the server is there and what it serves; answered without its scheduler, so at any time."""
        published = self._num_published
        version = await self.ask_weight_version()
        if self._num_published == published:  # otherwise the answer may be older than what is known
            self.weight_version = version
        await self._look_whether_held()
        if self.info is not None and not is_alive(self.info.process):
            self.suspect = True  # somebody answers, but not the one that was there

    async def ask_weight_version(self) -> str:
        """What the server says that its answers carry; raises ``EngineError``."""
        info = await self._looks.get("/model_info", self._timeouts.probe)
        return str(info.get("weight_version") or "")

    def gone(self, why: str) -> None:
        """It does not answer: whether what comes back is the same server is seen by the next ``probe``."""
        self.info, self.problem = None, why

    def died(self) -> None:
        """That server is no more: whoever answers next is another, even with the same seed and version."""
        self._last_info = None

    def close(self) -> None:
        """Let the connection go."""
        self._looks.close()

    def _is_another(self, info: EngineInfo) -> bool:
        last = self._last_info
        if last is None or info != last:
            return True
        return bool(info.process and last.process) and info.process != last.process

    async def _look_whether_held(self) -> None:
        if self.info is None or not self.info.shows_ready:
            return
        resumed = self._num_resumed
        status = await self._looks.status("/ready", self._timeouts.probe)
        if self._num_resumed == resumed:
            self.held = status == TAKES_NO_REQUESTS

    def _published(self, weight_version: str) -> None:
        self.weight_version = weight_version
        self._num_published += 1

    def _resumed(self) -> None:
        self._paused = self.held = False
        self._num_resumed += 1
