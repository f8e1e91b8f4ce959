"""What the checks are given: what was asked for, this host, and what was seen of the engine.

Invariant: no key is in it but in ``DoctorOptions``, whose text form leaves them out.
"""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sidecar.doctor.host import Host
from sidecar.engine.info import EngineInfo

DEFAULT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What the user says."""

    engine_url: str
    listen: str = ""
    """Where a sidecar is to serve; empty: not said."""
    target: str = ""
    """Where one serves already."""
    ranks: int | None = None
    """TP ranks of the trainer."""
    gpu_uuids: tuple[str, ...] = ()
    """The engine's, by TP rank."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """For each look."""
    api_key: str = field(default="", repr=False)
    """The engine's --api-key."""
    admin_key: str = field(default="", repr=False)
    """The engine's --admin-api-key."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.engine_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("--engine-url is not of the form http://host:port")
        if "@" in parts.netloc:
            raise ValueError("--engine-url must hold no password; keys go to --engine-api-key-file")
        if self.timeout_s <= 0 or (self.ranks is not None and self.ranks < 1):
            raise ValueError("--timeout and --ranks must be more than 0")
        if any(not key.isascii() or not key.isprintable() for key in (self.api_key, self.admin_key)):
            raise ValueError("a key of the engine's holds characters that no header can carry; is it the right file?")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What may be in no output."""
        return tuple(filter(None, (self.api_key, self.admin_key)))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSeen:
    """What the engine has told, and what this host shows of it."""

    info: EngineInfo | None = None
    """None: it does not say what it is."""
    memory_saver: bool = False
    """Whether it was started with --enable-memory-saver."""
    skew_s: float | None = None
    """By how much its clock is ahead of this one; None: it does not tell."""
    process: str = ""
    """``PID/START`` of what listens at its port."""
    forwarder: str = ""
    """The command that listens there and only passes calls on; empty: it is the engine itself, or not seen."""

    @property
    def pid(self) -> str:
        """The engine's own process; empty where it is not seen."""
        return "" if self.forwarder else self.process.partition("/")[0]

    @property
    def on_cuda(self) -> bool:
        """Whether its weights are on GPUs, as far as it says."""
        return self.info is None or self.info.device == "cuda"


@dataclass(frozen=True, slots=True)
class Situation:
    """All of it."""

    options: DoctorOptions
    host: Host
    engine: EngineSeen
