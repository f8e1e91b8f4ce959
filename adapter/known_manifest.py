"""Manifests by digest: a plan that the sidecar has taken before is not told again.

Invariant: a call never fails because the sidecar has forgotten a digest; it is then made again, in full.
"""

from typing import Protocol, TypeVar

from adapter import wire
from adapter.errors import UpdateRefused
from adapter.planner import Plan
from adapter.recent import Recent
from adapter.sidecar_stub import Method, SidecarStub
from sidecar.v1 import weight_sync_pb2 as pb

MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"


class NamesManifest(Protocol):
    """A request with a manifest in it."""

    @property
    def manifest(self) -> pb.ManifestReference:
        """In full, or by digest."""


Request = TypeVar("Request", bound=NamesManifest)
Response = TypeVar("Response")


class KnownManifests:
    """The last plans that one client's updates were committed with; the same object is found at once."""

    def __init__(self) -> None:
        self._digests = Recent[Plan, str]()

    def remember(self, plan: Plan, digest: str) -> None:
        """The sidecar has told this plan's digest."""
        self._digests.put(plan, digest)

    def reference(self, plan: Plan) -> pb.ManifestReference:
        """The digest, or the manifest in full; raises ``ValueError`` for a dtype that cannot be sent."""
        if digest := self._digests.find(plan):
            return pb.ManifestReference(digest=digest)
        return pb.ManifestReference(manifest=wire.manifest(plan))

    def call(
        self, stub: SidecarStub, method: Method[Request, Response], request: Request, plan: Plan, timeout_s: float
    ) -> Response:
        """One call whose request refers to ``plan``. Raises ``WeightSyncError``."""
        try:
            return stub.call(method, request, timeout_s)
        except UpdateRefused as refusal:
            if refusal.reason != MANIFEST_UNKNOWN:
                raise
        request.manifest.CopyFrom(pb.ManifestReference(manifest=wire.manifest(plan)))
        return stub.call(method, request, timeout_s)
