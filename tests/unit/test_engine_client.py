"""The adapter's HTTP against a real server that answers in all of SGLang's forms."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapter.engine_client import EngineClient
from adapter.errors import EngineUnreachable, WeightSyncError
from adapter.generate import GenerateClient

REFUSALS = {
    "/text": "Flush cache failed.\n",
    "/message": json.dumps({"object": "error", "message": "no such thing", "code": 400}),
    "/error": json.dumps({"error": {"message": "no such thing"}}),
    "/success": json.dumps({"success": False, "message": "no such thing"}),
    "/plain-error": json.dumps({"error": "no such thing"}),
    "/other": json.dumps({"detail": [1]}),
    "/long": "x" * 10_000,
}
STREAMS = {
    "/stream": ['{"text": "a"}', '{"text": "ab"}', "[DONE]"],
    "/torn": ['{"text": "a"}', '{"text":'],
    "/broken": ['{"text": "a"}', '{"error": {"message": "out of memory"}}', "[DONE]"],
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, "application/json", '{"weight_version": "3"}')

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["content-length"]))
        if self.path in REFUSALS:
            self._send(400, "application/json" if REFUSALS[self.path][0] == "{" else "text/plain", REFUSALS[self.path])
        elif self.path in STREAMS:
            self._stream(STREAMS[self.path])
        elif self.path == "/slow":
            self._stream(['{"text": "a"}'] * 50, pause_s=0.1)
        elif self.path == "/torn-answer":
            self._send(200, "application/json", '{"text":')
        elif self.path == "/flush":
            self._send(200, "text/plain", "Cache flushed.")
        else:
            self._send(200, "application/json", sent.decode())

    def _send(self, status: int, kind: str, body: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def _stream(self, events: list[str], pause_s: float = 0.0) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for event in events:
            try:
                self.wfile.write(f"data: {event}\n\n".encode())
            except OSError:
                assert isinstance(self.server, Server)
                self.server.cut_off.set()
                return
            time.sleep(pause_s)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        self.cut_off = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(server: Server) -> EngineClient:
    return EngineClient(f"http://127.0.0.1:{server.server_address[1]}/")


def test_answers_come_as_json_or_as_the_text_that_they_are(client: EngineClient) -> None:
    assert client.get("/model_info", 5) == {"weight_version": "3"}
    assert client.post("/echo", {"a": [1]}, 5) == {"a": [1]}
    assert client.post("/flush", {}, 5) == "Cache flushed."
    assert client.answers()


@pytest.mark.parametrize("path", ["/message", "/error", "/success", "/plain-error"])
def test_refusals_of_every_form_are_told_in_the_servers_words(client: EngineClient, path: str) -> None:
    with pytest.raises(WeightSyncError, match=rf"127\.0\.0\.1:\d+ answered 400 to {path}: no such thing$"):
        client.post(path, {}, 5)


def test_refusals_without_a_message_are_told_as_they_are_and_not_at_length(client: EngineClient) -> None:
    with pytest.raises(WeightSyncError, match=r": Flush cache failed\.$"):
        client.post("/text", {}, 5)
    with pytest.raises(WeightSyncError, match=r'\{"detail": \[1\]\}$'):
        client.post("/other", {}, 5)
    with pytest.raises(WeightSyncError) as refused:
        client.post("/long", {}, 5)
    assert len(str(refused.value)) < 700


def test_a_stream_yields_its_events_and_ends(client: EngineClient) -> None:
    assert list(client.events("/stream", {}, 5)) == [{"text": "a"}, {"text": "ab"}]


def test_an_error_in_a_stream_is_raised_after_what_came_before(client: EngineClient) -> None:
    events = client.events("/broken", {}, 5)
    assert next(events) == {"text": "a"}
    with pytest.raises(WeightSyncError, match="broke off /broken: out of memory"):
        next(events)


def test_an_answer_that_is_no_json_is_the_servers_fault(client: EngineClient) -> None:
    says = r'the answer of the SGLang server at http://127\.0\.0\.1:\d+ to /torn.* is no JSON.*: {"text":$'
    with pytest.raises(WeightSyncError, match=says):
        client.post("/torn-answer", {}, 5)
    events = client.events("/torn", {}, 5)
    assert next(events) == {"text": "a"}
    with pytest.raises(WeightSyncError, match=says):
        next(events)


def test_a_stream_that_goes_on_and_on_ends_at_its_deadline(client: EngineClient) -> None:
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"the stream of /slow at .* did not end within 0\.5 s"):
        list(client.events("/slow", {}, 0.5))
    assert time.monotonic() - started < 3


def test_closing_a_stream_cuts_it_off_at_the_server(client: EngineClient, server: Server) -> None:
    events = client.events("/slow", {}, 30)
    next(events)
    events.close()
    assert server.cut_off.wait(5)


def test_nobody_there_is_told_apart_from_a_refusal() -> None:
    client = EngineClient("http://127.0.0.1:9")
    assert not client.answers()
    with pytest.raises(EngineUnreachable, match=r"the SGLang server at http://127\.0\.0\.1:9 did not answer /x: "):
        client.post("/x", {}, 5)


def test_what_json_has_no_form_for_is_the_callers_mistake(client: EngineClient) -> None:
    with pytest.raises(ValueError, match="the request to /echo holds what JSON has no form for"):
        client.post("/echo", {"a": float("nan")}, 5)


def test_the_typed_client_asks_for_one_prompt_in_one_form(server: Server) -> None:
    client = GenerateClient(f"http://127.0.0.1:{server.server_address[1]}")
    assert client.generate(input_ids=[1]).output_ids == ()
    for prompt in ({}, {"text": "a", "input_ids": [1]}):
        with pytest.raises(ValueError, match="give either text or input_ids"):
            client.generate(**prompt)  # type: ignore[arg-type]
    client.close()
