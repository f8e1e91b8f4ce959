"""Buckets for a server that has the replay loader (``--custom-weight-loader adapter.loader.load``), and its answers.

A bucket is then one POST as ever, of another load format: a few hundred bytes that name its manifest by digest, once
the loader knows that. What the loader did with it comes back in a file (``verdicts``), and counts instead of SGLang's
answer, which is always a success.

    greeting, once in an engine's life --- no answer ---> stock path for the rest of that life
        | answered
    bucket, manifest by digest --- unknown on a rank ---> the manifest in full, without the memory, which it holds

Invariants: memory is posted once, the manifest's second try goes without it; an update counts as loaded only if every
rank has said so.
"""

import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence

from sidecar import refusals
from sidecar.engine.info import EngineInfo
from sidecar.errors import EngineLost, EngineRefused, EngineUnreachable, Reason
from sidecar.header import Header, PauseMode
from sidecar.manifest_check import matcher
from sidecar.memory import CudaIpcMemory, Memory, is_kept
from sidecar.payload import BucketPayload, replay_entry
from sidecar.update import LoadPath, Update
from sidecar.verdicts import Outcome, Verdict, VerdictFile

logger = logging.getLogger(__name__)

MAGIC = "sglang-weight-sync replay 1\n"
PATHS = {
    Outcome.REPLAYED: LoadPath.REPLAYED,
    Outcome.PROVEN: LoadPath.PROVEN,
    Outcome.RECORDED: LoadPath.RECORDED,
    Outcome.FELL_BACK: LoadPath.FELL_BACK,
}

Post = Callable[[Sequence[bytes]], Awaitable[None]]
"""One POST to the engine; raises ``EngineError``."""


class Replay:
    """The replay loaders of one engine, as far as they have answered."""

    def __init__(self, address: str, *, enabled: bool = True) -> None:
        self._file = VerdictFile(address)
        self._enabled = enabled
        self._greeted = 0
        """Epoch whose loaders have answered the greeting."""
        self._silent = 0
        """Epoch whose loaders have not."""
        self._lives: tuple[str, ...] = ()
        """By rank."""
        self._known: set[str] = set()
        """Digests of buckets that every rank has a plan for."""
        self._nonce = ""
        """Of the last call."""

    def suits(self, header: Header, info: EngineInfo | None, epoch: int) -> bool:
        """Whether this update goes through the loader.

        Not where a bucket carries its version, which SGLang sets whatever the loader says. Decided once for an update.
        """
        if info is None or not self._enabled or epoch == self._silent:
            return False
        unpaused = header.pause_mode is PauseMode.NONE and not info.dialect.uses_sessions
        return info.replays and not unpaused

    def close(self) -> None:
        """Leave nothing behind."""
        self._file.remove()

    async def greet(self, update: Update, post: Post) -> None:
        """See that the loaders answer, before the first bucket of an engine's life; a note says if they do not."""
        if self._greeted == update.epoch:
            return
        self._known.clear()
        try:
            verdicts = await self._ask(update, [{"ask": "hello"}] * update.header.tp_size, post)
        except EngineRefused as refusal:
            self._do_without(update, refusal.message)
            return
        silent = [rank for rank, verdict in enumerate(verdicts) if verdict is None]
        if silent:
            self._do_without(update, f"ranks {silent} gave no answer; engine and sidecar must share /dev/shm and user")
            return
        self._greeted = update.epoch
        self._lives = tuple(verdict.life for verdict in verdicts if verdict)

    async def load(self, update: Update, bucket: int, payload: BucketPayload, post: Post) -> None:
        """Load one bucket on every rank; raises ``EngineError`` if one of them has not, or may not have."""
        memories = update.memories(bucket)
        in_full = payload.digest not in self._known
        asks = [{"ask": "load"} | _words(update, payload, memory, in_full=in_full) for memory in memories]
        verdicts = await self._ask(update, asks, post, memories, payload.size_bytes)
        unknown = [rank for rank, verdict in enumerate(verdicts) if verdict and verdict.outcome is Outcome.UNKNOWN]
        _touch(update, verdicts)
        if unknown and not in_full and None not in verdicts:
            verdicts = await self._in_full(update, payload, verdicts, unknown, post)
        self._judge(update, bucket, payload, verdicts)

    def was_loaded(self, update: Update, bucket: int, payload: BucketPayload) -> bool:
        """Whether every rank has loaded the bucket whose answer was lost, now that the engine has dealt with it."""
        try:
            self._judge(update, bucket, payload, self._file.read(update.header.tp_size, self._nonce))
        except EngineRefused as refusal:
            logger.warning("bucket %d: %s", bucket, refusal.message)
            return False
        return True

    async def _in_full(
        self,
        update: Update,
        payload: BucketPayload,
        verdicts: Sequence[Verdict | None],
        unknown: Sequence[int],
        post: Post,
    ) -> list[Verdict | None]:
        """The manifest, for ranks that hold the bucket and do not know it."""
        words = {"ask": "load_held"} | _words(update, payload, None, in_full=True)
        nothing: dict[str, object] = {"ask": "nothing"}
        asks = [words if rank in unknown else nothing for rank in range(len(verdicts))]
        try:
            answers = await self._ask(update, asks, post)
        except EngineUnreachable as error:  # it has the memory all the same
            raise EngineLost(error.reason, error.message, **error.details) from error
        return [answers[rank] if rank in unknown else verdict for rank, verdict in enumerate(verdicts)]

    async def _ask(
        self,
        update: Update,
        asks: Sequence[dict[str, object]],
        post: Post,
        memories: Sequence[Memory] = (),
        size_bytes: int = 0,
    ) -> list[Verdict | None]:
        """One POST, and every rank's answer. Raises ``EngineError``."""
        try:
            self._file.clear(len(asks))
        except OSError as error:
            message = f"the replay loader's answers have no place in /dev/shm: {error}"
            raise EngineRefused(Reason.ENGINE_REFUSED, message) from error
        self._nonce = secrets.token_hex(8)
        entries = []
        for rank, ask in enumerate(asks):
            header = ask | {"nonce": self._nonce, "verdict": self._file.name, "rank": rank}
            memory = memories[rank] if memories and not is_kept(memories[rank]) else None
            entries.append(replay_entry(MAGIC + json.dumps(header, separators=(",", ":")), memory, size_bytes))
        await post(entries)
        return self._file.read(len(asks), self._nonce)

    def _judge(self, update: Update, bucket: int, payload: BucketPayload, verdicts: Sequence[Verdict | None]) -> None:
        """Take note of how it was loaded; raise ``EngineRefused`` unless every rank has."""
        _touch(update, verdicts)
        for rank, verdict in enumerate(verdicts):
            if verdict is None or verdict.outcome not in PATHS or verdict.life != self._lives[rank]:
                self._known.discard(payload.digest)
                if verdict is None:
                    self._silent = update.epoch
                raise refusals.not_loaded(update, bucket, rank, verdict.why if verdict else "it gave no answer")
            update.loaded_by(PATHS[verdict.outcome], verdict.why)
        self._known.add(payload.digest)

    def _do_without(self, update: Update, why: str) -> None:
        self._silent = update.epoch
        update.replays = False
        note = f"the engine has the replay loader, but it cannot be used: {why}"
        logger.warning("%s", note)
        update.notes.append(note)


def _touch(update: Update, verdicts: Sequence[Verdict | None]) -> None:
    """Some rank has written weights, or may have: then the update cannot be undone, whatever the others say."""
    untouched = (Outcome.UNKNOWN, Outcome.READY)
    update.touched |= any(verdict is None or verdict.outcome not in untouched for verdict in verdicts)


def _words(update: Update, payload: BucketPayload, memory: Memory | None, *, in_full: bool) -> dict[str, object]:
    """What a loader must know of a bucket."""
    words: dict[str, object] = {
        "digest": payload.digest,
        "size": payload.size_bytes,
        "ranks": [update.header.tp_size, update.ep_size],
    }
    if isinstance(memory, CudaIpcMemory) and memory.lease:
        words["lease"] = memory.lease
        words["event"] = memory.ready_event.hex()
    if in_full:
        tensors = payload.tensors
        words["tensors"] = [[tensor.name, tensor.dtype, tensor.shape, tensor.byte_offset] for tensor in tensors]
        may_be_skipped = matcher(update.header.allow.unknown)
        words["skippable"] = [tensor.name for tensor in tensors if may_be_skipped(tensor.name)]
    return words
