"""What outlives a sidecar of the model, in memory."""

from sidecar.journal import Entry, Journal


class MemoryJournal(Journal):
    """A journal that outlives a sidecar of the model, but not the schedule."""

    def __init__(self) -> None:
        super().__init__(None)
        self._entry: Entry | None = None

    def begin(self, entry: Entry) -> None:
        self._entry = entry

    def clear(self) -> None:
        self._entry = None

    def unfinished(self) -> Entry | None:
        return self._entry
