"""The manifests seen last, checked, with what is derived from one once: so that a digest can stand for it.

Invariant: what is in here passed ``manifest.check``.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sidecar import manifest as manifests
from sidecar.errors import NotKnown, Reason
from sidecar.manifest import Manifest
from sidecar.payload import BucketPayload

KEPT_MANIFESTS = 8


@dataclass(frozen=True, slots=True)
class KnownManifest:
    """A checked manifest and its buckets' payloads, complete but for the memory handles."""

    manifest: Manifest
    digest: str
    payloads: tuple[BucketPayload, ...]


class ManifestStore:
    """The last few manifests, by digest."""

    def __init__(self, kept: int = KEPT_MANIFESTS) -> None:
        self._known: OrderedDict[str, KnownManifest] = OrderedDict()
        self._kept = kept
        self._digests: OrderedDict[bytes, str] = OrderedDict()
        """Of what passed, by the hash of the bytes that it was read from."""
        self._reading = asyncio.Lock()

    async def read(self, sent: bytes, read: Callable[[], Manifest], rank: int) -> KnownManifest:
        """What ``rank`` sent in full, as ``add`` takes it; raises ``InvalidRequest``.

        The ranks of an update send the same bytes: they are read and checked once, one rank after the other.
        """
        async with self._reading:
            hashed = hashlib.sha256(sent).digest()
            digest = self._digests.get(hashed, "")
            if digest in self._known:
                return self.get(digest)
            known = await self.add(await asyncio.to_thread(read), rank)
            self._digests[hashed] = known.digest
            while len(self._digests) > self._kept:
                self._digests.popitem(last=False)
            return known

    async def add(self, manifest: Manifest, rank: int) -> KnownManifest:
        """Check a manifest that ``rank`` sent in full and keep it; raises ``InvalidRequest``."""
        digest = await asyncio.to_thread(_checked_digest, manifest, rank)
        if digest not in self._known:
            payloads = await asyncio.to_thread(lambda: tuple(map(BucketPayload, manifest.buckets)))
            self._known.setdefault(digest, KnownManifest(manifest, digest, payloads))
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
        return self.get(digest)

    def get(self, digest: str) -> KnownManifest:
        """A manifest by its digest; raises ``NotKnown``."""
        known = self._known.get(digest)
        if known is None:
            message = f"no manifest with digest {digest[:64]!r} is known here; send the manifest in full"
            raise NotKnown(Reason.MANIFEST_UNKNOWN, message, digest=digest[:64])
        self._known.move_to_end(digest)
        return known


def _checked_digest(manifest: Manifest, rank: int) -> str:
    manifests.check(manifest, rank)
    return manifest.digest()
