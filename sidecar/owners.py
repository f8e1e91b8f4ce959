"""Which client speaks for a rank: the first that did, for as long as the update is remembered.

Only clients with a certificate have a name. Invariant: a rank that a named client has spoken for is nobody else's.
"""

from collections import OrderedDict

from sidecar.access import CALLER
from sidecar.errors import Forbidden, Reason

# An update has at most as many ranks as the engine, and 64 are remembered.
MAX_CLAIMS = 65_536


class Owners:
    """Names by update and rank."""

    def __init__(self) -> None:
        self._names: OrderedDict[tuple[str, int], str] = OrderedDict()

    def claim(self, update_id: str, rank: int) -> None:
        """The present caller speaks for ``rank``; raises ``Forbidden`` if another does."""
        name = CALLER.get().name
        owner = self._names.setdefault((update_id, rank), name)
        if owner != name:
            message = f"rank {rank} of update {update_id!r} belongs to another client than {name or 'this one'!r}; "
            message += "every call for a rank must come with the same client certificate"
            raise Forbidden(Reason.NOT_YOURS, message, updateId=update_id, rank=rank)
        if len(self._names) > MAX_CLAIMS:
            self._names.popitem(last=False)
