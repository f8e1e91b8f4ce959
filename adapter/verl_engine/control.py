"""What a rank asks of the server besides weights: generation, memory, pauses, its cache.

Invariant: nothing is sent that would kill the server: memory is released only when it is idle, and only what is
released is resumed. Control acts on rank 0 and does nothing on the others, so that all ranks may call it, or rank 0
alone. Memory is the exception: on a mesh all ranks call, and keep count of what rank 0 says that it has released.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from adapter.engine_client import EngineClient
from adapter.errors import EngineUnreachable, WeightSyncError
from adapter.exchange import Exchange
from adapter.verl_engine.deaths import Deaths
from adapter.verl_engine.facts import EngineFacts
from adapter.verl_engine.fleet import say
from adapter.verl_engine.generate_body import generate_body
from adapter.verl_engine.memory import MemoryState

CONTROL_S = 60.0
# SGLang waits for requests to end when it pauses by aborting them, and maps gigabytes when it resumes.
SLOW_CONTROL_S = 300.0
PAUSE_MODES = ("abort", "retract", "in_place")
_IDLE_POLL_S = 0.2


class EngineControl:
    """The server as one rank sees it."""

    def __init__(self, facts: EngineFacts, deaths: Deaths, exchange: Exchange | None, *, acts: bool) -> None:
        self.memory = MemoryState()
        self._facts = facts
        self._deaths = deaths
        self._exchange = exchange
        self._acts = acts
        self._engine = EngineClient(facts.server_url) if facts.server_url is not None else None
        self._warned = False

    @property
    def engine(self) -> EngineClient:
        """Raises ``ValueError`` on a rank that does not know the server's address."""
        if self._engine is None:
            raise ValueError(
                "this rank was not told where the server is: give every rank the same port= (without device_mesh_cpu "
                "they cannot tell each other)"
            )
        return self._engine

    # Generation.

    def generate(self, parameters: Mapping[str, Any], timeout_s: float, *, collective: bool) -> Any:
        """SGLang's answer: one dict, or a list of them."""

        def answer() -> Any:
            self.memory.check_generate()
            return self.engine.post("/generate", generate_body(parameters, stream=False), timeout_s)

        return self._ask(answer, collective)

    def stream(self, parameters: Mapping[str, Any], timeout_s: float, *, collective: bool) -> Iterator[Any]:
        """SGLang's chunks, each with all of the text so far."""

        def chunks() -> Generator[Any, None, None]:
            with self._deaths.noticed():
                self.memory.check_generate()
                yield from self.engine.events("/generate", generate_body(parameters, stream=True), timeout_s)

        return chunks() if self._exchange is None or not collective else self._exchange.stream(chunks)

    def weights_by_name(self, name: str, truncate_size: int, *, collective: bool) -> Any:
        """The first numbers of a tensor, where SGLang's model class can show it."""
        body = {"name": name, "truncate_size": truncate_size}
        return self._ask(lambda: self.engine.post("/get_weights_by_name", body, CONTROL_S), collective)

    def _ask(self, question: Callable[[], Any], collective: bool) -> Any:
        def asked() -> Any:
            with self._deaths.noticed():
                return question()

        return asked() if self._exchange is None or not collective else self._exchange.ask(asked)

    # Memory.

    def release(self, tags: Sequence[str] | str | None, idle_timeout_s: float) -> None:
        """Waits until the server is idle, at most so long."""
        self.memory.mark_released(self._ask(lambda: self._release(tags, idle_timeout_s), collective=True))

    def _release(self, tags: Sequence[str] | str | None, idle_timeout_s: float) -> list[str]:
        wanted = self.memory.to_release(tags)
        if wanted and self._acts:
            self._warn_if_without_effect()
            self._wait_until_idle(idle_timeout_s)
            self.engine.post("/release_memory_occupation", {"tags": wanted}, SLOW_CONTROL_S)
        return wanted

    def resume(self, tags: Sequence[str] | str | None) -> None:
        """Those of the tags that are released."""
        resumed = self._ask(lambda: self._resume(tags), collective=True)
        self.memory.mark_resumed(resumed, keeps_weights=self._facts.keeps_weights)

    def _resume(self, tags: Sequence[str] | str | None) -> list[str]:
        wanted = self.memory.to_resume(tags)
        if wanted and self._acts:
            self.engine.post("/resume_memory_occupation", {"tags": wanted}, SLOW_CONTROL_S)
        return wanted

    def mark_updated(self, allow_missing: Sequence[str]) -> None:
        """All weights were written but those that the caller has allowed to be missing."""
        if allow_missing and self.memory.weights_lost and self._acts:
            say(
                "the weights were released without a backup, so what the update left out by allow_missing "
                f"({', '.join(allow_missing)}) has undefined content"
            )
        self.memory.mark_updated()

    def _warn_if_without_effect(self) -> None:
        if not self._facts.frees_memory and not self._warned:
            self._warned = True
            say("release_memory_occupation frees nothing: the server was started without enable_memory_saver=True")

    def _wait_until_idle(self, timeout_s: float) -> None:
        """A flush succeeds under just the condition that a release asserts, and is refused without harm."""
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                return self.flush(0.0)
            except EngineUnreachable:
                raise
            except WeightSyncError as error:
                if time.monotonic() > give_up:
                    raise WeightSyncError(
                        f"requests still ran after {timeout_s:g} s, and SGLang dies of a release meanwhile; wait for "
                        f"them, or call abort_request(abort_all=True) first ({error})"
                    ) from error
            time.sleep(_IDLE_POLL_S)

    # Requests and the cache.

    def flush(self, timeout_s: float) -> None:
        """Empty the prefix cache; SGLang waits so long for requests to end first."""
        if self._acts:
            wait = f"?timeout={timeout_s:g}" if timeout_s > 0 else ""
            self.engine.post(f"/flush_cache{wait}", {}, CONTROL_S + timeout_s)

    def pause(self, mode: str) -> None:
        """Hold generation back."""
        if mode not in PAUSE_MODES:
            raise ValueError(f"pause mode {mode!r} is none of {', '.join(PAUSE_MODES)}")
        if self._acts:
            self.engine.post("/pause_generation", {"mode": mode}, SLOW_CONTROL_S)

    def resume_generation(self) -> None:
        """Let it go on."""
        if self._acts:
            self.engine.post("/continue_generation", {}, CONTROL_S)

    def abort(self, rid: str, *, abort_all: bool) -> None:
        """End one request, or all."""
        if not rid and not abort_all:
            raise ValueError("abort_request needs a rid, or abort_all=True: an empty rid is the beginning of every one")
        if self._acts:
            self.engine.post("/abort_request", {"rid": rid, "abort_all": abort_all}, CONTROL_S)
