"""The updates seen last, by id, so that their outcome can be asked for after their callers have gone.

Invariant: an id names at most one update here: the newest attempt.
"""

from collections import OrderedDict

from sidecar import refusals
from sidecar.update import LoadPath, Update, UpdateState

KEPT_UPDATES = 64


class UpdateHistory:
    """The last few updates."""

    def __init__(self, kept: int = KEPT_UPDATES) -> None:
        self._updates: OrderedDict[str, Update] = OrderedDict()
        self._kept = kept

    def add(self, update: Update) -> None:
        """Remember a new update, in place of an earlier attempt with its id."""
        before = self._updates.pop(update.id, None)
        if before is not None:
            update.num_posted_before = max(before.num_posted, before.num_posted_before)
        self._updates[update.id] = update
        while len(self._updates) > self._kept:
            self._updates.popitem(last=False)

    def get(self, update_id: str) -> Update | None:
        """The update of that id, if it is remembered."""
        return self._updates.get(update_id)

    def find(self, update_id: str) -> Update:
        """The update of that id; raises ``NotKnown``."""
        found = self._updates.get(update_id)
        if found is None:
            raise refusals.unknown_update(update_id, self._kept)
        return found

    def committed(self, weight_version: str, epoch: int) -> bool:
        """Whether that life of the engine has served that version."""
        return any(
            update.state is UpdateState.COMMITTED
            and (update.header.weight_version, update.epoch) == (weight_version, epoch)
            for update in self._updates.values()
        )

    @property
    def last_ended(self) -> Update | None:
        """The newest update to which nothing more happens."""
        return next((update for update in reversed(self._updates.values()) if update.state.ended), None)


def sentence(update: Update) -> str:
    """How an update ended, for the log: what, how large, how long in each phase, and why if it failed."""
    size = sum(bucket.size_bytes for bucket in update.manifest.buckets[: update.num_loaded])
    phases = ", ".join(f"{phase.name.lower()} {1e3 * s:.1f}" for phase, s in update.phase_seconds.items())
    text = f"update {update.id} (version {update.header.weight_version}): {update.state.name.lower()}"
    text += f", {update.num_loaded} of {update.num_buckets} buckets, {size} bytes per rank"
    if update.load_path is not LoadPath.NOT_LOADED:
        text += f", {update.load_path.name.lower()}"
    if len(late := {rank: delivery.joined_at - update.started for rank, delivery in update.deliveries.items()}) > 1:
        last = max(late, key=late.__getitem__)
        text += f"; rank {last} came last, {1e3 * late[last]:.1f} ms after the first"
    return text + (f"; ms: {phases}" if phases else "") + (f": {update.error.message}" if update.error else "")
