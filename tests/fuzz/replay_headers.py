"""What the sidecar says to the replay loader, read by the loader's own parser: the same fields, or ``ValueError``.

Needs torch, as the loader does.
"""

import json
import random
from math import prod

from adapter.replay import header as loader
from sidecar import manifest as manifests
from sidecar.header import Header
from sidecar.manifest import ITEM_SIZES, BucketSpec, Manifest, TensorSpec
from sidecar.manifest_check import Allowance
from sidecar.memory import CudaIpcMemory
from sidecar.payload import BucketPayload
from sidecar.replay import MAGIC, _words
from sidecar.update import Update
from tests.fuzz.values import Values

LEASE = "sglang-weight-sync-lease-" + "0" * 32
BUCKET_BYTES = 1 << 20


class HeaderFuzz:
    """Draws from one generator of random numbers."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._values = Values(rng)

    def check_one(self) -> int:
        """One header there and back, and once more with something changed in its text."""
        payload = self._payload()
        text = self._written(payload)
        self._check_same(loader.parse(text), payload)
        self._check_refused_in_words(text)
        return 1

    def _payload(self) -> BucketPayload:
        names = {self._values.text()[:1024] for _ in range(self._rng.randint(1, 6))}
        tensors = tuple(self._tensor(name) for name in sorted(names) if name and name.isprintable())
        bucket = BucketSpec(BUCKET_BYTES, tensors or (self._tensor("only"),))
        manifests.check(Manifest((bucket,)), rank=0)
        return BucketPayload(bucket)

    def _tensor(self, name: str) -> TensorSpec:
        dtype, shape = self._rng.choice(list(ITEM_SIZES)), tuple(self._rng.choices((0, 1, 3, 8), k=3))
        offset = 8 * self._rng.randrange(1000)
        return TensorSpec(name, dtype, shape, offset, prod(shape) * ITEM_SIZES[dtype])

    def _written(self, payload: BucketPayload) -> str:
        allow = Allowance(unknown=tuple(tensor.name for tensor in payload.tensors[:1]))
        header = Header(update_id="u", weight_version="v", rank=0, tp_size=2, allow=allow)
        update = Update(header, Manifest(()), payload.digest)
        event = bytes(64) if self._rng.random() < 0.5 else b""
        lease = LEASE if self._rng.random() < 0.5 else ""
        memory = CudaIpcMemory("", b"", 0, 0, "", 0, b"", event_sync_required=False, lease=lease, ready_event=event)
        words = _words(update, payload, memory, in_full=True)
        said = {"ask": "load"} | words | {"nonce": "n", "verdict": "f", "rank": 1}
        return MAGIC + json.dumps(said, separators=(",", ":"))

    @staticmethod
    def _check_same(read: loader.Header, payload: BucketPayload) -> None:
        assert (read.digest, read.size, read.rank, read.ranks) == (payload.digest, payload.size_bytes, 1, (2, 1))
        found = [(part.name, str(part.dtype), part.shape, part.offset) for part in read.parts]
        expected = [(one.name, f"torch.{one.dtype}", one.shape, one.byte_offset) for one in payload.tensors]
        assert found == expected
        assert payload.tensors[0].name in read.skippable

    def _check_refused_in_words(self, text: str) -> None:
        at = self._rng.randrange(len(text))
        damaged = text[:at] + self._values.text() + text[at + self._rng.randrange(3) :]
        try:
            loader.parse(damaged)
        except ValueError:
            return
