"""An HTTP server that behaves as SGLang's does when weights are updated, by release, and misbehaves on demand.

    with ScriptedEngine(release="0.5.23", tp_size=2) as engine:
        engine.fault("/update_weights_from_tensor", Fault.LOSE_REPLY, after=1)
        ...                                # a sidecar works on engine.url
        assert engine.posts("/pause_generation") == 1

It opens real shared memory for its digests and lets go of it as torch does (``tests.fakes.shared_memory``), and never
opens GPU memory. Invariant: what it answers is what a real server answers; ``tests/conformance`` runs on both.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

from tests.fakes.auth import Keys
from tests.fakes.calls import Call, Reply, outcome, text_reply
from tests.fakes.dialects import EngineDialect
from tests.fakes.engine_life import FLUSH_FAILED, EngineLife, Settings
from tests.fakes.faults import ConnectionCut, EngineDied, Fault, FaultPlan, PlannedFault
from tests.fakes.http_frontend import HttpFrontend
from tests.fakes.replay import LOADER, ReplayScript
from tests.fakes.schema import complaint

CHECKPOINT = {"model.embed_tokens.weight": "c0ffee0000000000"}
FOREVER = 1 << 30
"""``times`` of a fault that does not wear off."""


class ScriptedEngine:
    """A server from construction (or ``restart``) until ``die`` or ``close``."""

    def __init__(
        self,
        release: str = "0.5.23",
        tp_size: int = 1,
        *,
        device: str = "cpu",
        token_s: float = 0.0,
        checkpoint: Mapping[str, str] = CHECKPOINT,
        known_names: Collection[str] | None = None,
        custom_loaders: Collection[str] = (),
        replay: ReplayScript | None = None,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        server_info: Mapping[str, object] | None = None,
        without_routes: Collection[str] = (),
        port: int = 0,
    ) -> None:
        self._keys = Keys(api_key, admin_api_key)
        self._settings = Settings(
            dialect=EngineDialect(release),
            tp_size=tp_size,
            device=device,
            token_s=token_s,
            checkpoint=checkpoint,
            known_names=known_names,
            custom_loaders=(*custom_loaders, LOADER) if replay else custom_loaders,
            replay=replay or ReplayScript(),
            without_routes=without_routes,
            server_info={"api_key": api_key, "admin_api_key": admin_api_key} | dict(server_info or {}),
        )
        self.calls: list[Call] = []
        """Every call, in the order of arrival, over all lives."""
        self.cause_of_death = ""
        """What ended this life, if a call did."""
        self._faults = FaultPlan()
        self._lock = threading.Lock()
        self._life = EngineLife(self._settings)
        self._frontend: HttpFrontend | None = HttpFrontend(self._answer, port)
        self.port = self._frontend.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def paused(self) -> bool:
        return self._life.generation.paused

    @property
    def session_open(self) -> bool:
        return self._life.session_open

    @property
    def weight_version(self) -> str:
        return self._life.weight_version

    @property
    def loaded(self) -> list[dict[str, str]]:
        """Per TP rank: tensor name -> digest of its content."""
        return [dict(rank) for rank in self._life.weights.ranks]

    @property
    def adapters(self) -> list[str]:
        """LoRA adapters that requests can name."""
        return list(self._life.lora.loaded)

    @property
    def groups(self) -> list[str]:
        """torch.distributed groups that it is in, in the order in which it joined."""
        return list(self._life.groups.joined)

    @property
    def random_seed(self) -> int:
        """New in every life."""
        return self._life.seed

    @property
    def alive(self) -> bool:
        return not self._life.dead.is_set()

    @property
    def running_requests(self) -> int:
        """Requests that the scheduler decodes now: those of clients, and as many more as a test sets."""
        return self._life.generation.running

    @running_requests.setter
    def running_requests(self, number: int) -> None:
        self._life.generation.set_running(number)

    @property
    def waiting_requests(self) -> int:
        """Requests that were retracted and come back at continue."""
        return self._life.generation.waiting

    @property
    def aborted_requests(self) -> int:
        return self._life.generation.num_aborted

    @property
    def num_hanging(self) -> int:
        """Calls that a ``Fault.HANG`` holds now."""
        return self._faults.num_hanging

    def paths(self, method: str = "POST") -> list[str]:
        """Paths of the calls so far, in order."""
        return [call.path for call in self.calls if call.method == method]

    def posts(self, path: str) -> int:
        """How many POSTs of ``path`` arrived."""
        return self.paths().count(path)

    def fault(
        self,
        path: str,
        fault: Fault,
        *,
        after: int = 0,
        times: int = 1,
        delay_s: float = 0.5,
        status: int = 400,
        message: str = "",
    ) -> None:
        """Plan ``fault`` for ``times`` calls of ``path`` (or ANY_PATH), once ``after`` more of them have passed."""
        planned = PlannedFault(path, fault, after, times, delay_s, status, message)
        self._faults.add(planned)

    def release(self) -> None:
        """Let every call that hangs go on, and plan no more hangs."""
        self._faults.release()

    def forget_faults(self) -> None:
        """Plan nothing any more; calls that hang go on."""
        self._faults.clear()

    def forget_plans(self) -> None:
        """The replay loaders know no manifest any more."""
        self._life.loaders.forget()

    def die(self) -> None:
        """As SIGKILL: connections are cut, the port is closed, all state is gone."""
        with self._lock:
            self._life.kill()
            self._faults.release()
            if self._frontend is not None:
                self._frontend.cut_all()

    def restart(self) -> None:
        """A new process on the same port: checkpoint weights, a new random_seed, no faults planned."""
        self.close()
        self.cause_of_death = ""
        self._life = EngineLife(self._settings)
        self._frontend = HttpFrontend(self._answer, self.port)

    def close(self) -> None:
        """End for good; an error inside the engine's own code comes out here."""
        self.die()
        self._faults.clear()
        frontend, self._frontend = self._frontend, None
        if frontend is not None and (errors := frontend.close()):
            raise ExceptionGroup("the scripted engine itself failed", [e for e in errors if isinstance(e, Exception)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, call: Call) -> Reply | None:
        """The frontend's way in, on a thread per connection."""
        self.calls.append(call)
        life = self._life
        try:
            return self._reply(life, call)
        except ConnectionCut:
            return None
        except EngineDied as death:
            if life is self._life:
                self.cause_of_death = self.cause_of_death or str(death) or f"killed at {call.path}"
                self.die()
            return None

    def _reply(self, life: EngineLife, call: Call) -> Reply:
        route = life.route(call)
        if isinstance(route, Reply):
            return route
        dialect = self._settings.dialect
        refusal = self._keys.refusal(call) or complaint(call, dialect.has_sessions, dialect.lora_by_rank)
        if refusal is not None:
            return refusal
        return self._act(life, call, route, self._faults.take(call.path))

    def _act(self, life: EngineLife, call: Call, route: Callable[[Call], Reply], planned: PlannedFault | None) -> Reply:
        fault = planned.fault if planned else None
        if planned is not None and fault is Fault.REFUSE:
            return _refusal(call.path, planned)
        if fault is Fault.CUT:
            raise ConnectionCut
        if fault is Fault.DIE:
            raise EngineDied
        before = self._faults.hang if fault is Fault.HANG else _nothing
        reply = life.act(call, route, before, fault)
        if planned is not None:
            _after(life, planned)
        return reply


def _nothing() -> None:
    """What goes before an ordinary call."""


def _after(life: EngineLife, planned: PlannedFault) -> None:
    """What a fault does to a call that was carried out."""
    if planned.fault is Fault.DIE_AFTER:
        raise EngineDied
    if planned.fault is Fault.LOSE_REPLY:
        raise ConnectionCut
    if planned.fault is Fault.LATE and life.dead.wait(planned.delay_s):
        raise EngineDied


def _refusal(path: str, planned: PlannedFault) -> Reply:
    if planned.status == 500:
        return Reply(500, b"Internal Server Error", "text/plain; charset=utf-8")
    if path == "/flush_cache":
        return text_reply(planned.status, planned.message or FLUSH_FAILED)
    said = outcome(False, planned.message or f"{path} was refused by a test")
    return replace(said, status=planned.status)
