"""Settings of ``serve``, checked before anything is bound or opened.

Invariant: a ``ServeConfig`` that exists is one that can be tried. ``ValueError`` says what is wrong with a setting.
"""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

# Linux: sun_path has 108 bytes, the last of them 0.
MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """One deadline per phase, in seconds. A client's own deadline shortens the wait for ranks, never the applying."""

    collect: float = 300.0
    """From the first rank's arrival to the last one's."""
    pause: float = 60.0
    """Abort mode and drain mode wait for requests to end, and so does unloading a LoRA adapter."""
    session: float = 60.0
    """begin_weight_update and end_weight_update, each."""
    bucket: float = 300.0
    """For the ranks to deliver the next bucket, while generation is paused."""
    load: float = 600.0
    """One POST of one bucket."""
    flush: float = 10.0
    """Including repeated tries."""
    verify: float = 120.0
    """One look at the engine's checksums, if an update asks for it."""
    disk: float = 1800.0
    """One load of a checkpoint by the engine itself."""
    publish: float = 30.0
    resume: float = 30.0
    probe: float = 5.0
    """One look at whether the engine is there."""

    @property
    def total(self) -> float:
        """How long a call without a deadline may wait."""
        return float(sum(getattr(self, name) for name in self.__dataclass_fields__))

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ValueError(f"timeout {name} must be more than 0 s")


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host and port; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


Address = UnixAddress | TcpAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything ``serve`` needs."""

    engine_url: str
    listen: Address
    insecure: bool = False
    """Whether it may listen where other hosts reach it, though nothing guards a TCP port."""
    gpu_uuids: tuple[str, ...] = ()
    """By TP rank of the engine, as torch prints them; empty: they are looked for."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    accept_checkpoint: bool = False
    """Whether an engine that was restarted is ready with its checkpoint's weights."""
    replay: bool = True
    """Whether the engine's replay loader is used, where it has one."""
    drain_s: float = 30.0
    """At SIGTERM, how long the update in hand may take to end."""
    metrics_port: int | None = None
    """Prometheus text over plain HTTP on this loopback port."""
    max_message_bytes: int = 64 << 20
    """Room for a manifest of about half a million tensors."""

    journal_path: Path | None = None
    """Set by hand; see ``journal``."""

    @property
    def journal(self) -> Path | None:
        """Where it is written that an update is being applied: beside the socket; on TCP only where it was set."""
        beside = Path(f"{self.listen.path}.journal") if isinstance(self.listen, UnixAddress) else None
        return self.journal_path or beside

    @property
    def is_exposed(self) -> bool:
        """Whether other hosts may reach it."""
        return isinstance(self.listen, TcpAddress) and not self.listen.is_loopback

    def __post_init__(self) -> None:
        parts = urlsplit(self.engine_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--engine-url {self.engine_url!r} is not of the form http://host:port")
        if self.is_exposed and not self.insecure:
            problem = f"{str(self.listen)!r} is not a loopback address, and the sidecar has no TLS: use unix:/path.sock"
            raise ValueError(f"{problem}, or say --insecure if every host that reaches it may change the weights")
        if self.journal_path is not None and not self.journal_path.parent.is_dir():
            raise ValueError(f"--journal {self.journal_path}: the folder does not exist; make it, for this user alone")


def parse_address(text: str) -> Address:
    """``unix:/path.sock`` or ``host:port`` -> an address."""
    if text.startswith("unix:"):
        return UnixAddress(_checked_socket_path(text.removeprefix("unix:")))
    host, separator, port = text.rpartition(":")
    host = host.strip("[]")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is neither unix:/path.sock nor host:port")
    return TcpAddress(host, int(port))


def _checked_socket_path(path: str) -> Path:
    if not path.startswith("/"):
        raise ValueError(f"unix:{path} must be an absolute path, such as unix:/run/weight-sync/sidecar.sock")
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError(f"unix:{path} is longer than the {MAX_SOCKET_PATH} bytes that Linux allows")
    if not Path(path).parent.is_dir():
        raise ValueError(f"unix:{path}: the folder does not exist; make it, for this user alone")
    return Path(path)
