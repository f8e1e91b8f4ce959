"""One HTTP connection to SGLang: bounded calls, off the event loop, with every failure named.

Invariant: a request is sent once. ``EngineUnreachable`` means that it never left; ``EngineLost`` that it may have
been carried out; ``EngineRefused`` that the server answered no. Nothing is retried here.
"""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from sidecar.errors import EngineDown, EngineLost, EngineRefused, EngineTimeout, EngineUnreachable, Reason

CONNECT_TIMEOUT_S = 5.0
# SGLang closes connections that were idle for 5 s (uvicorn's keep-alive time-out); one that is about to be closed
# would lose a request, so an older connection is not used again.
MAX_IDLE_S = 2.0
# A schema error echoes the request: keep messages readable.
MAX_MESSAGE = 500


class EngineHttp:
    """Keep-alive calls to one server, made by one worker thread."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-http")
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy from the environment must not see local calls
        self._last_used = 0.0

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        """GET ``path``: the answer, which must be a JSON object."""
        return self._json_object(path, await self._request("GET", path, None, timeout_s))

    async def ask(self, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """POST ``body``: the answer, which must be a JSON object."""
        return self._json_object(path, await self._request("POST", path, body, timeout_s))

    async def status(self, path: str, timeout_s: float) -> int:
        """GET ``path``: its status, whatever that is."""
        try:
            return (await self._request("GET", path, None, timeout_s)).status_code
        except EngineRefused as refusal:
            return int(refusal.details["httpStatus"])

    def _json_object(self, path: str, response: requests.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except requests.exceptions.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            message = f"{self.url}{path} answered something else than a JSON object; is it an SGLang server?"
            raise EngineRefused(Reason.ENGINE_REFUSED, message, engineUrl=self.url, path=path)
        return answer

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
        """POST ``body``: returns if the answer is a success."""
        await self._request("POST", path, body, timeout_s)

    def close(self) -> None:
        """Let the connection and the worker go; a call in flight ends by its own time-out."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._session.close()

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> requests.Response:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._send, method, path, body, timeout_s)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> requests.Response:
        if time.monotonic() - self._last_used > MAX_IDLE_S:
            self._session.close()  # drops pooled connections; the session itself stays usable
        timeout = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
        try:
            response = self._session.request(method, self.url + path, json=body, timeout=timeout)
        except requests.exceptions.ConnectTimeout as error:
            raise self._unreachable(EngineUnreachable, path, "no connection in time") from error
        except requests.exceptions.Timeout as error:
            raise self._lost(EngineTimeout, path, f"no answer within {timeout_s:.1f} s") from error
        except requests.exceptions.RequestException as error:
            if _was_refused(error):
                raise self._unreachable(EngineDown, path, "connection refused") from error
            if _was_never_sent(error):
                raise self._unreachable(EngineUnreachable, path, "no connection") from error
            raise self._lost(EngineLost, path, "the connection broke before an answer came") from error
        finally:
            self._last_used = time.monotonic()
        if not response.ok:
            raise self._refused(path, response)
        return response

    def _unreachable(self, kind: type[EngineUnreachable], path: str, why: str) -> EngineUnreachable:
        message = f"the engine at {self.url} cannot be reached ({why}, {path}); is the SGLang server up?"
        return kind(Reason.ENGINE_UNREACHABLE, message, engineUrl=self.url, path=path)

    def _lost(self, kind: type[EngineLost], path: str, why: str) -> EngineLost:
        message = f"{path} was sent to the engine at {self.url}, but {why}; whether it was carried out is unknown"
        return kind(Reason.ENGINE_LOST, message, engineUrl=self.url, path=path)

    def _refused(self, path: str, response: requests.Response) -> EngineRefused:
        said = _message_of(response)
        message = f"the engine at {self.url} answered {response.status_code} to {path}: {said}"
        return EngineRefused(
            Reason.ENGINE_REFUSED, message, engineUrl=self.url, path=path, httpStatus=response.status_code, said=said
        )


def _was_refused(error: requests.exceptions.RequestException) -> bool:
    """Whether nobody listened, as opposed to somebody who is slow or far away."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(getattr(cause, "__cause__", None), ConnectionRefusedError)


def _was_never_sent(error: requests.exceptions.RequestException) -> bool:
    """Whether urllib3 failed to connect, as opposed to losing a connection that had taken the request."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return type(cause).__name__ in ("NewConnectionError", "NameResolutionError")


def _message_of(response: requests.Response) -> str:
    """SGLang's own words: JSON with "message" ("error_message" of adapters), or plain text."""
    try:
        said = response.json()
    except requests.exceptions.JSONDecodeError:
        said = response.text
    if isinstance(said, dict):
        said = said.get("message") or said.get("error_message") or said
    return " ".join(str(said).split())[:MAX_MESSAGE]
