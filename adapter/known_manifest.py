"""Manifests by digest: a plan that the sidecar has taken before is not told again.

Invariant: a call never fails because the sidecar has forgotten a digest; it is then made again, in full.
"""

from typing import Protocol, TypeVar

from adapter import wire
from adapter.errors import UpdateRefused
from adapter.planner import Plan
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


class KnownManifest:
    """The last plan that one client's update was committed with."""

    def __init__(self) -> None:
        self._known: tuple[Plan, str] | None = None

    def remember(self, plan: Plan, digest: str) -> None:
        """The sidecar has told this plan's digest."""
        self._known = (plan, digest)

    def reference(self, plan: Plan) -> pb.ManifestReference:
        """The digest, or the manifest in full; raises ``ValueError`` for a dtype that cannot be sent."""
        if self._known and self._known[0] == plan:
            return pb.ManifestReference(digest=self._known[1])
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
