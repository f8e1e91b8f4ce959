"""The POSTs of an update without gRPC and sidecar: what is left is what those two cost.

The payload is written by the sidecar's own composer. Invariant: one kept connection, no Nagle delay, handles made and
the body composed before the clock starts: nobody who POSTs the same bytes can be faster.
"""

import base64
import http.client
import json
import socket
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from adapter import wire
from adapter.planner import Plan
from sidecar import convert, payload
from sidecar.v1 import weight_sync_pb2 as pb

CALL_S = 120.0


def body(plan: Plan, handles: Sequence[str]) -> bytes:
    """The load's JSON: ``plan`` has one bucket, ``handles`` one serialised message per TP rank, in hex."""
    (bucket,) = convert.manifest(wire.manifest(plan)).buckets
    composer = payload.BucketPayload(bucket)
    messages = [pb.MemoryHandle.FromString(bytes.fromhex(handle)) for handle in handles]
    entries = [composer.entry(convert.memory(message, rank, 0)) for rank, message in enumerate(messages)]
    content = {
        "serialized_named_tensors": [base64.b64encode(entry).decode() for entry in entries],
        "load_format": payload.LOAD_FORMAT,
        "flush_cache": False,
    }
    return json.dumps(content).encode()


class Poster:
    """One connection to one server."""

    def __init__(self, url: str, *, uses_sessions: bool) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        self._connection = http.client.HTTPConnection(address.hostname, address.port or 80, timeout=CALL_S)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._uses_sessions = uses_sessions

    def update(self, load: bytes, version: str) -> dict[str, float]:
        """The sidecar's whole sequence; seconds by phase. The connection is closed then."""
        publish: dict[str, object] = {"new_version": version, "abort_all_requests": False}
        try:
            return {
                "pause": self._post("/pause_generation", {"mode": "retract"}),
                **({"begin": self._post("/begin_weight_update", {"selector": "all"})} if self._uses_sessions else {}),
                "load": self._post("/update_weights_from_tensor", load),
                **({"end": self._post("/end_weight_update", {})} if self._uses_sessions else {}),
                "flush": self._post("/flush_cache", {}),
                "publish": self._post("/update_weight_version", publish),
                "resume": self._post("/continue_generation", {}),
            }
        finally:
            self.close()

    def close(self) -> None:
        """Let the connection go."""
        self._connection.close()

    def _post(self, path: str, content: Mapping[str, object] | bytes) -> float:
        started = time.monotonic()
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise ValueError(f"{path} answered {response.status}: {said.decode(errors='replace')[:500]}")
        return time.monotonic() - started
