"""Which update a call belongs to, and how that is to be made: what all ranks must say alike.

Pure. Invariant: nothing in a checked header is longer, or names another rank, than an update can have.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from sidecar.errors import InvalidRequest, Reason, UnsuitableEngine
from sidecar.manifest_check import Allowance

MAX_TEXT = 128
MAX_RANKS = 4096
"""Of a trainer over a group; each is waited for, and listed where it is missing."""


class PauseMode(StrEnum):
    """What happens to running requests; the first three names are SGLang's."""

    RETRACT = "retract"
    IN_PLACE = "in_place"
    ABORT = "abort"
    DRAIN = "drain"
    """They are waited for before anything is touched."""
    NONE = "none"
    """Nothing is paused, where no request can meet half of an update."""


class Selector(StrEnum):
    """Which of the engine's models; the names are SGLang's (0.5.21 and later)."""

    ALL = "all"
    TARGET = "target"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Which update a call belongs to; all but ``rank`` is the same on every rank."""

    update_id: str
    weight_version: str
    rank: int
    tp_size: int
    pause_mode: PauseMode = PauseMode.RETRACT
    selector: Selector | None = None
    """None: not said, which is all of them."""
    verify: bool = False
    content_digest: str = ""
    allow: Allowance = field(default_factory=Allowance)
    keep_cache: bool = False
    """Whether the prefix cache is left as it is."""
    group_name: str = ""
    """Over which torch.distributed group the bytes come; empty: from memory."""
    two_phase: bool = False
    """Whether a word of the trainer's is needed before the version is published."""

    def check_id(self) -> None:
        """Raise if this cannot name an update."""
        self._check_text("update_id", self.update_id, at_least=1)

    def check(self, engine_tp_size: int) -> None:
        """Raise if this cannot be an update of an engine with ``engine_tp_size`` TP ranks."""
        self.check_id()
        self._check_text("weight_version", self.weight_version, at_least=1)
        self._check_text("content_digest", self.content_digest, at_least=0)
        self._check_text("group_name", self.group_name, at_least=0)
        self._check_rank(self.tp_size if self.group_name else engine_tp_size)

    def _check_text(self, name: str, value: str, at_least: int) -> None:
        if not at_least <= len(value) <= MAX_TEXT or not value.isprintable():
            expected = f"{at_least} to {MAX_TEXT} printable characters"
            message = f"rank {self.rank}: {name} must be {expected}, not {value[:MAX_TEXT]!r}"
            raise InvalidRequest(Reason.INVALID_HEADER, message, rank=self.rank, field=name)

    def _check_rank(self, engine_tp_size: int) -> None:
        """Over a group any number of ranks takes part, since the engine reads the memory of none."""
        if self.tp_size != engine_tp_size:
            message = f"rank {self.rank}: the trainer sends from {self.tp_size} ranks, but the engine has tp_size "
            message += f"{engine_tp_size}; start one sender per engine TP rank"
            raise UnsuitableEngine(
                Reason.TP_SIZE_MISMATCH, message, rank=self.rank, tpSize=self.tp_size, engineTpSize=engine_tp_size
            )
        if self.tp_size > MAX_RANKS:
            message = f"rank {self.rank}: {self.tp_size} ranks take part; at most {MAX_RANKS} may, and rank 0 is enough"
            raise InvalidRequest(Reason.RANK_OUT_OF_RANGE, message, rank=self.rank, tpSize=self.tp_size)
        if not 0 <= self.rank < self.tp_size:
            message = f"rank {self.rank} is outside 0..{self.tp_size - 1}; number the ranks as the engine does"
            raise InvalidRequest(Reason.RANK_OUT_OF_RANGE, message, rank=self.rank, tpSize=self.tp_size)
