"""The steps of an update, as SGLang's HTTP has them in each release.

Invariant: every call is bounded, and one that writes weights is made once. Repeated are only those that change
nothing when repeated (looks, checksums, flush, publish, resume). Bodies always say ``flush_cache: false``: with the
default, a refused flush kills releases up to 0.5.21.
"""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sidecar.config import EngineKeys, Timeouts
from sidecar.engine.http import EngineHttp
from sidecar.engine.info import DIALECTS, Dialect
from sidecar.engine.life import EngineLife
from sidecar.errors import (
    EngineBusy,
    EngineDown,
    EngineError,
    EngineLost,
    EngineRefused,
    EngineRestarted,
    EngineTimeout,
    EngineUnreachable,
    Reason,
)
from sidecar.header import PauseMode, Selector

# A refused flush is tried again at this pace: requests may be on their way out.
RETRY_S = 0.25
IDEMPOTENT_TRIES = 3
SESSION_ALREADY_OPEN = "already open"
NO_SESSION_OPEN = "no weight-update session is open"
OUTSIDE_SESSION = "must run between"
# Refused in and outside a session, each in its own words, before anything is touched (0.5.21 and later: before that an
# unknown group kills the server).
SESSION_PROBE: dict[str, object] = {
    "names": [],
    "dtypes": [],
    "shapes": [],
    "group_name": "weight-sync-probe",
    "flush_cache": False,
}


T = TypeVar("T")


class SGLangEngine(EngineLife):
    """One SGLang server; the coordinator's ``Engine``."""

    def __init__(
        self, url: str, timeouts: Timeouts, gpu_uuids: Sequence[str] = (), keys: EngineKeys | None = None
    ) -> None:
        super().__init__(url, timeouts, gpu_uuids, keys)
        self._steps = EngineHttp(url, keys)
        self._bound: tuple[int, Dialect] = (0, DIALECTS[0])
        """The epoch that the update in hand began with, and the rules it follows."""

    @property
    def uses_sessions(self) -> bool:
        """Whether the update in hand loads inside a session."""
        return self._bound[1].uses_sessions

    def attach(self) -> None:
        """Aim the next steps at the server that answers now; raises ``EngineUnreachable``."""
        if self.info is None or self._last_info is None:
            message = self.problem or f"the engine at {self.url} has just gone; is the SGLang server up?"
            raise EngineUnreachable(Reason.ENGINE_UNREACHABLE, message, engineUrl=self.url)
        self._bound = (self.epoch, self.info.dialect)

    # Pausing.

    async def pause(self, mode: PauseMode, limit_s: float) -> None:
        """Hold generation, within ``limit_s`` and the pause time-out; the mode says what happens to running requests.

        Raises ``EngineBusy`` where the mode needs an idle engine and this one is not.
        """
        self.attach()
        limit_s = min(limit_s, self._timeouts.pause)
        match mode:
            case PauseMode.NONE if not self.uses_sessions:
                return  # SGLang's own lock lets no request meet the one bucket half-loaded
            case PauseMode.NONE:
                await self._pause_idle(limit_s, patience_s=0.0)
            case PauseMode.DRAIN:
                await self._pause_idle(limit_s, patience_s=limit_s)
            case _:
                if mode is PauseMode.ABORT:
                    await self._look_whether_held()  # what is known may be a second old
                await self._pause(mode, limit_s)

    async def hold(self) -> None:
        """See that generation is held, for an update that breaks off without having paused it."""
        if not self._paused:
            await self._pause(PauseMode.RETRACT, self._timeouts.pause)

    async def _pause(self, mode: PauseMode, timeout_s: float) -> None:
        """Ask for some pause always: a server that was started again meanwhile is not paused.

        But never for "abort" on top of a pause that a failed update, or somebody else, has left: it waits for ever for
        requests that cannot end, and blocks /continue_generation (SGLang 0.5.23,
        managers/tokenizer_control_mixin.py).
        """
        if (self._paused or self.held) and mode is PauseMode.ABORT:
            mode = PauseMode.RETRACT
        self._paused = True  # even if its answer is lost
        await self._post("/pause_generation", {"mode": mode.value}, timeout_s)

    async def _pause_idle(self, limit_s: float, patience_s: float) -> None:
        """Pause at a moment without running requests; they are waited for while new ones are still taken.

        In place, since that freezes running requests where a flush sees them: one that is refused says that the engine
        was not idle (after "retract", 0.5.21 and later flush over the requests that wait).
        """
        if self._paused or self.held:  # what is in flight cannot end before this update
            return await self._pause(PauseMode.RETRACT, limit_s)
        give_up = time.monotonic() + patience_s
        while True:
            await self._pause(PauseMode.IN_PLACE, limit_s)
            if await self._flushed():
                return None
            await self.resume()
            left = give_up - time.monotonic()
            if left <= 0 or not await self._idle_within(left):
                raise self._busy(patience_s)

    async def _idle_within(self, seconds: float) -> bool:
        """SGLang's own wait for an idle engine, which flushes as well."""
        try:
            await self._post(f"/flush_cache?timeout={seconds:.3f}", {}, seconds + self._timeouts.flush)
        except EngineRefused:
            return False
        return True

    def _busy(self, waited_s: float) -> EngineBusy:
        message = f"the engine at {self.url} still had requests in flight after {waited_s:.1f} s, and this pause mode "
        message += "needs an idle engine; wait longer (--pause-timeout and the call's own deadline), or choose retract"
        return EngineBusy(Reason.ENGINE_BUSY, message, engineUrl=self.url)

    # Loading.

    async def begin(self, selector: Selector, limit_s: float) -> None:
        """Open the session, where this release has one. One that was left open is ended first."""
        if not self.uses_sessions:
            return
        limit_s = min(limit_s, self._timeouts.session)
        try:
            await self._begin(selector, limit_s)
        except EngineRefused as refusal:
            if SESSION_ALREADY_OPEN not in refusal.message:
                raise
            await self.end()
            await self._begin(selector, limit_s)

    async def _begin(self, selector: Selector, timeout_s: float) -> None:
        await self._post("/begin_weight_update", {"selector": selector.value}, timeout_s)

    async def session_is_open(self) -> bool:
        """Whether the session is open, asked without touching anything; only where sessions exist, while paused."""
        try:
            await self._post("/update_weights_from_distributed", SESSION_PROBE, self._timeouts.session)
        except EngineRefused as refusal:
            return OUTSIDE_SESSION not in refusal.message
        raise AssertionError("SGLang cannot receive weights from a group that does not exist")

    async def load(
        self, entries: Sequence[bytes], load_format: str, selector: Selector, weight_version: str | None
    ) -> None:
        """Load one bucket: ``entries`` has one pickle per TP rank, in rank order, of the given ``load_format``.

        ``weight_version``: set together with the bucket, for an update that does not pause.
        """
        body: dict[str, object] = {
            "serialized_named_tensors": [base64.b64encode(entry).decode() for entry in entries],
            "load_format": load_format,
            "flush_cache": False,
        }
        if self._bound[1].has_selector:
            body["selector"] = selector.value
        if weight_version is not None:
            body["weight_version"] = self._publishing = weight_version
        await self._post("/update_weights_from_tensor", body, self._timeouts.load)
        if weight_version is not None:
            self._published(weight_version)

    async def load_from_disk(self, model_path: str) -> None:
        """Have the server load a checkpoint that it can read itself; needs no session.

        As "auto", the one kind of loader that this route takes: by default it would be what the server was started
        with, such as "dummy" (SGLang 0.5.23, model_executor/model_runner_components/weight_updater.py).
        """
        body = {"model_path": model_path, "load_format": "auto", "flush_cache": False, "abort_all_requests": False}
        await self._post("/update_weights_from_disk", body, self._timeouts.disk)

    async def settle(self, lost: EngineLost) -> None:
        """Wait until the scheduler has dealt with a load whose answer was ``lost``; raises if it has not in time.

        /server_info is answered by the scheduler, in turn.
        """
        had_its_time = isinstance(lost, EngineTimeout)
        limit_s = self._timeouts.probe if had_its_time else self._timeouts.load

        async def look() -> None:
            with self._noticing_death():
                await self._steps.get("/server_info", limit_s)

        await again(look, broke)  # a server that is being killed takes connections for a moment still
        await self.probe()

    async def end(self) -> None:
        """Close the session, where this release has one: the engine finishes what it derives from the weights."""
        if self.uses_sessions:
            await self._post("/end_weight_update", {}, self._timeouts.session)

    async def end_if_open(self) -> None:
        """Close a session that may have been opened; any other refusal than that none is open is an error."""
        try:
            await self.end()
        except EngineRefused as refusal:
            if NO_SESSION_OPEN not in refusal.message:
                raise

    # Making it visible.

    async def flush(self, patience_s: float) -> bool:
        """Empty the prefix cache; False if that did not work for ``patience_s``, as requests are in its way.

        Plain /flush_cache: its waiting form wants an idle engine, which a paused one with requests never is.
        """
        give_up = time.monotonic() + min(patience_s, self._timeouts.flush)
        while not await self._flushed():
            if time.monotonic() + RETRY_S > give_up:
                return False
            await asyncio.sleep(RETRY_S)
        return True

    async def _flushed(self) -> bool:
        try:
            await self._post("/flush_cache", {}, self._timeouts.flush)
        except (EngineRefused, EngineLost):
            return False
        return True

    async def checksums(self) -> list[dict[str, str]]:
        """By TP rank: each tensor's name and digest. ``EngineRefused`` where this server cannot compute them."""

        async def ask() -> dict[str, Any]:
            return await self._ask("/weights_checker", {"action": "checksum"}, self._timeouts.verify)

        answer = await again(ask, broke)  # changes nothing
        # With DP attention every replica answers, each for all TP ranks.
        by_rank = {_tp_rank(rank, place): dict(rank["checksums"]) for place, rank in enumerate(answer["ranks"])}
        return [by_rank[rank] for rank in sorted(by_rank)]

    async def publish(self, weight_version: str) -> None:
        """Set the version that answers carry; keeps requests alive (SGLang's default aborts them all)."""
        body = {"new_version": weight_version, "abort_all_requests": False}
        self._publishing = weight_version

        async def post() -> None:
            try:
                await self._post("/update_weight_version", body, self._timeouts.publish)
            except (EngineLost, EngineRefused):
                if not await self.serves(weight_version):
                    raise

        await again(post, _was_not_done)
        self._published(weight_version)

    async def serves(self, weight_version: str) -> bool:
        """Whether the server says that its answers carry that version, which it was told before."""
        try:
            serves = await self.ask_weight_version() == weight_version
        except EngineError:
            return False
        if serves:
            self._published(weight_version)
        return serves

    async def abort_requests(self) -> None:
        """End every request in flight, so that what waits for them gets its turn."""
        await self._post("/abort_request", {"rid": "", "abort_all": True}, self._timeouts.resume)

    async def resume(self) -> None:
        """Let generation go on."""
        await again(lambda: self._post("/continue_generation", {}, self._timeouts.resume), _was_not_done)
        self._resumed()

    def close(self) -> None:
        """Let the connections go."""
        self._steps.close()
        super().close()

    async def _post(self, path: str, body: dict[str, object], timeout_s: float) -> None:
        """A step of the update in hand, for the very server that it began with."""
        self._check_bound()
        with self._noticing_death():
            await self._steps.post(path, body, timeout_s)

    async def _ask(self, path: str, body: dict[str, object], timeout_s: float) -> dict[str, Any]:
        """The same, with its answer."""
        self._check_bound()
        with self._noticing_death():
            return await self._steps.ask(path, body, timeout_s)

    @contextmanager
    def _noticing_death(self) -> Iterator[None]:
        """What a call that fails says about the server's life, at once and not only at the next look."""
        try:
            yield
        except EngineDown as down:
            self.died()
            self.gone(down.message)
            raise
        except (EngineLost, EngineUnreachable):
            self.suspect = True
            raise

    def _check_bound(self) -> None:
        if self.epoch != self._bound[0] or self._last_info is None:
            message = f"the engine at {self.url} was restarted during the update and has lost what was loaded; "
            message += "send the update again"
            raise EngineRestarted(Reason.ENGINE_RESTARTED, message, engineUrl=self.url)


async def again(call: Callable[[], Awaitable[T]], worth_it: Callable[[EngineError], bool]) -> T:
    """The answer to a ``call`` that changes nothing when repeated, in a few tries; the last one's error counts."""
    for _ in range(IDEMPOTENT_TRIES - 1):
        try:
            return await call()
        except EngineError as error:
            if not worth_it(error):
                raise
        await asyncio.sleep(RETRY_S)
    return await call()


def broke(error: EngineError) -> bool:
    """An answer that was lost, but not one that had its time: that would take as long again."""
    return isinstance(error, EngineLost) and not isinstance(error, EngineTimeout)


def _was_not_done(error: EngineError) -> bool:
    """Nobody else could have done it, so it is worth another try."""
    return isinstance(error, EngineLost | EngineRefused)


def _tp_rank(rank: dict[str, Any], place: int) -> int:
    """Which TP rank's checksums these are: by a list (0.5.23) or one place (0.5.20 and before), else their place."""
    said = rank.get("parallelism_info") or {}
    if isinstance(said, list):
        said = said[0]
    return int(said.get("tp_rank", place))
