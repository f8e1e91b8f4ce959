"""One trainer rank in a process of its own, without torch: the generated stubs and a little patience.

    python -m tests.faults.rank --fd 5 --target unix:/tmp/rank1.sock --rank 1 --manager /tmp/manager.sock

Takes commands as JSON from an inherited socket and tells what happens as JSON; ends when the socket closes:

    {"do": "update", ...Job}   -> {"event": "loaded", "bucket": 0} ..., {"event": "done", "saw": ..., "seconds": ...}
    {"do": "go on"}               gives a bucket free that the job withholds
    {"do": "settle"}           -> {"event": "counts", "counts": [...], ...}   holders of its memory: 1 is us alone
    {"do": "forget"}              drops all of it

It does what a careful trainer does when a call ends without the sidecar's word: it asks for the outcome over a new
connection and, where the update is still in hand or was committed, makes the same call again. Invariant: every
update ends with one "done", within its deadlines.
"""

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar, cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.fakes import SharedFile
from tests.fakes.shared_memory import release
from tests.faults import content

Answer = TypeVar("Answer")

LEARN_S = 10.0
"""How long a rank whose call broke asks for the outcome."""
ALONE_S = 0.5
"""How long it asks where nobody listens."""
LET_GO_S = 0.5
IN_HAND = ("COLLECTING", "APPLYING", "COMMITTED")
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One update, from one rank."""

    update_id: str
    version: str
    one_call: bool = False
    deadline_s: float = 20.0
    """Of each call."""
    withhold: int | None = None
    """A bucket that is pushed only after "go on"."""
    verify: bool = False


class Refused(Exception):
    """The sidecar's own word: ErrorInfo.reason."""


class Broken(Exception):
    """A call that ended without one, and what was learned afterwards: "UNAVAILABLE>ABORTED"."""


class UnaryCall(Protocol[Answer]):
    """A method of the generated stub."""

    def __call__(self, request: Any, /, timeout: float | None = None) -> Answer:
        """Call it and wait."""

    def future(self, request: Any, timeout: float | None = None) -> "grpc.Future[Answer]":
        """Call it."""


@dataclass(slots=True)
class Piece:
    """Memory that was handed over."""

    file: SharedFile
    update_id: str
    bucket: int


@dataclass(slots=True)
class Rank:
    """State of the process."""

    target: str
    rank: int
    manager: str
    tell: Callable[..., None]
    pieces: list[Piece] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)
    _channels: list[grpc.Channel] = field(default_factory=list)
    _held: "grpc.Future[pb.HoldUpdateResponse] | None" = None
    _missed: str = ""
    """How the first call that got no answer ended."""

    # The connection.

    def connect(self) -> None:
        """A connection of its own, besides those that exist."""
        self._channels.append(grpc.insecure_channel(self.target, options=OPTIONS))

    @property
    def rpc(self) -> pb_grpc.WeightSyncServiceStub:
        return pb_grpc.WeightSyncServiceStub(self._channels[-1])

    def disconnect(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels.clear()

    # One update.

    def update(self, job: Job) -> None:
        """Carry ``job`` out and tell how it went."""
        self.connect()
        started = time.monotonic()
        self._missed = ""
        try:
            (self._in_one_call if job.one_call else self._in_buckets)(job)
            saw = "COMMITTED"
        except Refused as refused:
            saw = self._learn(job.update_id) if self._missed else str(refused)
        except Broken as broken:
            saw = str(broken)
        self.tell("done", saw=f"{self._missed}>{saw}" if self._missed else saw, seconds=time.monotonic() - started)
        self.disconnect()

    def _in_one_call(self, job: Job) -> None:
        handles = [self._handle(job, bucket) for bucket in range(content.NUM_BUCKETS)]
        request = pb.UpdateWeightsRequest(update=self._header(job), manifest=_reference(), handles=handles)
        self._finish(
            job, lambda: self.rpc.UpdateWeights, request, self.rpc.UpdateWeights.future(request, job.deadline_s)
        )

    def _in_buckets(self, job: Job) -> None:
        begin = pb.BeginUpdateRequest(update=self._header(job), manifest=_reference())
        self._finish(job, lambda: self.rpc.BeginUpdate, begin, self.rpc.BeginUpdate.future(begin, job.deadline_s))
        hold = pb.HoldUpdateRequest(update_id=job.update_id, rank=self.rank)
        self._held = self.rpc.HoldUpdate.future(hold, job.deadline_s)  # a call that nobody refers to is cancelled
        pushes = [self._push(job, bucket) for bucket in range(content.NUM_BUCKETS)]
        for request, call in pushes:
            self._finish(job, lambda: self.rpc.PushBucket, request, call)
            self.tell("loaded", bucket=request.bucket)
        commit = pb.CommitUpdateRequest(update_id=job.update_id, rank=self.rank)
        self._finish(job, lambda: self.rpc.CommitUpdate, commit, self.rpc.CommitUpdate.future(commit, job.deadline_s))

    def _push(self, job: Job, bucket: int) -> "tuple[pb.PushBucketRequest, grpc.Future[pb.PushBucketResponse]]":
        if bucket == job.withhold:
            self.go_on.wait(LEARN_S)
        request = pb.PushBucketRequest(
            update_id=job.update_id, rank=self.rank, bucket=bucket, handle=self._handle(job, bucket)
        )
        return request, self.rpc.PushBucket.future(request, job.deadline_s)

    def _header(self, job: Job) -> pb.UpdateHeader:
        return pb.UpdateHeader(
            update_id=job.update_id,
            weight_version=job.version,
            rank=self.rank,
            tp_size=content.TP_SIZE,
            verify=job.verify,
        )

    # What a careful trainer does with an answer that does not come.

    def _finish(
        self, job: Job, method: Callable[[], UnaryCall[Answer]], request: Any, call: "grpc.Future[Answer]"
    ) -> Answer:
        """The answer to ``call``, or to the same call made again; raises ``Refused`` or ``Broken``."""
        try:
            return call.result()
        except grpc.RpcError as error:
            self._note(error)
        if self._learn(job.update_id) in IN_HAND:
            with contextlib.suppress(grpc.RpcError):
                return method()(request, timeout=job.deadline_s)
        raise Broken(self._learn(job.update_id))

    def _note(self, error: grpc.RpcError) -> None:
        """The sidecar's word ends the update; a broken call is told, and asked about over a new connection."""
        if reason := reason_of(error):
            raise Refused(reason) from error
        if not self._missed:
            self._missed = code_of(error)
            self.tell("missed", code=self._missed)
            self.connect()

    def _learn(self, update_id: str) -> str:
        """The update's state; UNKNOWN to a sidecar that forgot it; NOBODY where none listens."""
        give_up = time.monotonic() + LEARN_S
        alone_since: float | None = None
        while time.monotonic() < give_up:
            try:
                answer = self.rpc.GetUpdate(pb.GetUpdateRequest(update_id=update_id), timeout=LEARN_S)
                return pb.UpdateState.Name(answer.outcome.state).removeprefix("UPDATE_STATE_")
            except grpc.RpcError as error:
                if reason_of(error):
                    return "UNKNOWN"
                alone_since = alone_since or time.monotonic()
                if code_of(error) == "UNAVAILABLE" and time.monotonic() - alone_since > ALONE_S:
                    return "NOBODY"
            time.sleep(0.05)
        return "SILENCE"

    # Memory.

    def _handle(self, job: Job, bucket: int) -> pb.MemoryHandle:
        file = SharedFile(content.bucket_content(job.version, bucket))
        self.pieces.append(Piece(file, job.update_id, bucket))
        shared = pb.SharedMemoryHandle(manager_path=self.manager, name=file.name, size_bytes=file.size_bytes)
        return pb.MemoryHandle(shared_memory=shared)

    def settle(self) -> None:
        """Wait a moment for what the engine has yet to let go, take back what is out of use, and tell what is held."""
        self.connect()
        give_up = time.monotonic() + LET_GO_S
        while any(map(self._is_in_use, self.pieces)) and time.monotonic() < give_up:
            time.sleep(0.02)
        for piece in self.pieces:
            if piece.file.count > 1 and not self._is_in_use(piece):
                release(piece.file.name)
        self.tell("counts", counts=[piece.file.count for piece in self.pieces])
        self.disconnect()

    def _is_in_use(self, piece: Piece) -> bool:
        """Whether somebody else may still read it: told as the adapter's ledger does."""
        if piece.file.count <= 1:
            return False
        status = self.rpc.GetStatus(pb.GetStatusRequest(), timeout=LEARN_S)
        try:
            outcome = self.rpc.GetUpdate(pb.GetUpdateRequest(update_id=piece.update_id), timeout=LEARN_S).outcome
        except grpc.RpcError:  # a successor, whose engine has dealt with all that its predecessor sent
            return False
        if pb.UpdateState.Name(outcome.state).removeprefix("UPDATE_STATE_") in ("COLLECTING", "APPLYING"):
            return True
        another_engine = outcome.engine_epoch != status.engine.epoch
        never_posted = piece.bucket >= outcome.num_posted_ever
        return not (never_posted or another_engine or status.weight_version)

    def forget(self) -> None:
        """Drop every piece."""
        for piece in self.pieces:
            piece.file.close()
        self.pieces.clear()


def _reference() -> pb.ManifestReference:
    return pb.ManifestReference(manifest=content.manifest())


def code_of(error: grpc.RpcError) -> str:
    """The status that gRPC gives it."""
    return str(cast("grpc.Call", error).code().name)  # every error of a call is one


def reason_of(error: grpc.RpcError) -> str:
    """ErrorInfo.reason; empty if it did not come from the sidecar."""
    status = rpc_status.from_call(cast("grpc.Call", error))
    for detail in status.details if status else ():
        info = ErrorInfo()
        if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info):
            return str(info.reason)
    return ""


def serve(commands: "Connection[bytes, bytes]", rank: Rank) -> None:
    """Until the socket closes."""
    working = threading.Thread()
    while True:
        try:
            command = json.loads(commands.recv_bytes())
        except EOFError:
            return
        match command.pop("do"):
            case "update":
                rank.go_on.clear()
                working = threading.Thread(target=rank.update, args=(Job(**command),), daemon=True)
                working.start()
            case "go on":
                rank.go_on.set()
            case "settle":
                if working.is_alive():
                    working.join()
                rank.settle()
            case "forget":
                rank.forget()


def main(argv: Sequence[str] | None = None) -> int:
    """Serves commands until the socket closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--manager", required=True)
    options = parser.parse_args(argv)
    lock = threading.Lock()
    with Connection(options.fd) as commands:

        def tell(event: str, **values: object) -> None:
            with lock:
                commands.send_bytes(json.dumps({"event": event, **values}).encode())

        rank = Rank(options.target, options.rank, options.manager, tell)
        tell("ready")
        serve(commands, rank)
        rank.forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
