"""What outlives the sidecar: that an update was being applied, in a small file beside its socket.

Written before the engine is paused, again before the first weight is written, and removed once the engine serves one
version again. So a sidecar that finds one knows that its predecessor died, or was stopped, with the engine in between:
paused, perhaps with a session open, perhaps with weights of no one version. Another engine than the one written about
has been started since and has forgotten all that.

Invariant: a file that cannot be read, since its writer died over it, says no less than that an update was in hand.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One update that was begun."""

    update_id: str
    weight_version: str
    engine_seed: str
    """``EngineInfo.seed`` of the server that was touched; empty if unknown."""
    engine_process: str = ""
    """``EngineInfo.process`` of it; empty if it could not be seen."""
    written: bool = True
    """Whether weights may have been written, or only generation paused."""

    def is_about(self, seed: str, process: str) -> bool:
        """Whether that may be the server that answers now; in doubt it is."""
        same_seed = self.engine_seed in ("", seed)
        return same_seed and (not process or self.engine_process in ("", process))


class Journal:
    """One file; without a path, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def begin(self, entry: Entry) -> None:
        """Say that ``entry`` is about to touch the engine; raises ``OSError`` if that cannot be written."""
        if self._path is None:
            return
        self._path.write_text(json.dumps(asdict(entry)))

    def clear(self) -> None:
        """Say that the engine serves one version."""
        if self._path is None:
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:  # the successor will be too careful, which is no reason to fail here
            logger.warning("the journal %s cannot be removed: %s", self._path, error)

    def unfinished(self) -> Entry | None:
        """What a predecessor left."""
        if self._path is None or not self._path.exists():
            return None
        try:
            return Entry(**json.loads(self._path.read_text()))
        except (ValueError, TypeError):
            return Entry(update_id="unknown", weight_version="unknown", engine_seed="")
