"""Stands between a sidecar and a real engine, and can hold one request: before it goes on, or before its answer does.

Invariant: whatever is not held passes unchanged; once it has died, its port refuses connections, as the engine's does.
"""

import threading
from dataclasses import dataclass, field

import requests

from tests.fakes.calls import Call, Reply
from tests.fakes.http_frontend import HttpFrontend

FORWARD_S = 60.0


@dataclass(slots=True)
class Hold:
    """One request that waits."""

    path: str
    skip: int = 0
    """How many of them still pass."""
    answered: bool = False
    """Whether it is held with its answer, instead of before the engine has it."""
    reached: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)


class HoldingProxy:
    """Listens from its construction on."""

    def __init__(self, engine_url: str) -> None:
        self._engine_url = engine_url
        self._lock = threading.Lock()
        self._hold: Hold | None = None
        self._frontend: HttpFrontend | None = HttpFrontend(self._answer)
        self.port = self._frontend.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def hold(self, path: str, *, skip: int = 0, answered: bool = False) -> Hold:
        """The next request of this path, after ``skip`` others; ``reached`` tells when it is there."""
        hold = Hold(path, skip, answered)
        with self._lock:
            self._hold = hold
        return hold

    def die(self) -> None:
        """As the kernel does for a killed server behind it."""
        frontend, self._frontend = self._frontend, None
        if frontend is not None:
            frontend.cut_all()
            self.release()
            frontend.close()

    def revive(self, engine_url: str) -> None:
        """On the same port, before another server."""
        self._engine_url = engine_url
        self._frontend = HttpFrontend(self._answer, self.port)

    def release(self) -> None:
        """What is held goes on; nothing more is held."""
        with self._lock:
            hold, self._hold = self._hold, None
        if hold is not None:
            hold.gate.set()

    def close(self) -> None:
        """End for good."""
        self.release()
        self.die()

    def _answer(self, call: Call) -> Reply | None:
        hold = self._held(call.path)
        if hold and not hold.answered:
            self._wait(hold)
        try:
            answer = self._forward(call)
        except requests.RequestException:
            return None
        if hold and hold.answered:
            self._wait(hold)
        return Reply(answer.status_code, answer.content, answer.headers.get("content-type", ""))

    def _held(self, path: str) -> Hold | None:
        with self._lock:
            hold = self._hold
            if hold is None or hold.path != path or hold.reached.is_set():
                return None
            hold.skip -= 1
            return hold if hold.skip < 0 else None

    @staticmethod
    def _wait(hold: Hold) -> None:
        hold.reached.set()
        hold.gate.wait()

    def _forward(self, call: Call) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            return session.request(
                call.method,
                self._engine_url + call.path,
                params=dict(call.query),
                data=call.raw_body,
                headers={"content-type": call.headers.get("content-type", "application/json")},
                timeout=FORWARD_S,
            )
