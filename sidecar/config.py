"""Settings of ``serve``, checked before anything is bound or opened.

Invariant: a ``ServeConfig`` that exists is one that can be tried. ``ValueError`` says what is wrong with a setting.
"""

import ipaddress
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sidecar.secret import NO_SECRET, Secret

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
    group: float = 120.0
    """For all members to join a torch.distributed group."""
    decide: float = 300.0
    """In two phases, for all ranks to say that the version is to be published, while generation is paused."""
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
class EngineKeys:
    """What SGLang was started with; no caller of the sidecar ever sees them."""

    api: Secret = NO_SECRET
    """--api-key: for what looks."""
    admin: Secret = NO_SECRET
    """--admin-api-key: for what changes something; without one, that needs the api key (SGLang 0.5.8 and later)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files, read again when they change."""

    certificate: Path
    """The server's, with its chain."""
    key: Path
    client_ca: Path | None = None
    """If given, clients must show a certificate that it has signed (mTLS)."""

    def __post_init__(self) -> None:
        for path in filter(None, (self.certificate, self.key, self.client_ca)):
            if not os.access(path, os.R_OK):
                raise ValueError(f"{path}: the file for TLS does not exist or cannot be read")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRules:
    """Who may call; nothing set: whoever reaches the address may do everything."""

    update_token: Secret = NO_SECRET
    """Bearer token of those who may update."""
    look_token: Secret = NO_SECRET
    """Bearer token of those who may only look."""
    update_clients: tuple[str, ...] = ()
    """With mTLS: names (SAN or CN) of the clients that may update; the others may only look. Empty: all may update."""

    @property
    def has_tokens(self) -> bool:
        """Whether a caller must bring a token."""
        return bool(self.update_token or self.look_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one caller, or all together, may ask for."""

    message_bytes: int = 64 << 20
    """Room for a manifest of about half a million tensors."""
    tensors: int = 1_000_000
    """In one manifest."""
    buckets: int = 65_536
    """In one manifest."""
    open_calls: int = 4_096
    """At a time, health apart; 4 for each of 1,024 ranks."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"--max-{name.replace('_', '-')} must be at least 1")
        if self.message_bytes >= 1 << 31:
            raise ValueError("--max-message-bytes must be below 2 GiB, which gRPC cannot exceed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything ``serve`` needs."""

    engine_url: str
    listen: Address
    engine_keys: EngineKeys = field(default_factory=EngineKeys)
    tls: TlsFiles | None = None
    access: AccessRules = field(default_factory=AccessRules)
    insecure: bool = False
    """Whether it may listen where other hosts reach it, though nothing guards that port."""
    gpu_uuids: tuple[str, ...] = ()
    """By TP rank of the engine, as torch prints them; empty: they are looked for."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    limits: Limits = field(default_factory=Limits)
    accept_checkpoint: bool = False
    """Whether an engine that was restarted is ready with its checkpoint's weights."""
    require_update: bool = False
    """Whether an engine is not ready before its first update, even one that was there before this sidecar."""
    replay: bool = True
    """Whether the engine's replay loader is used, where it has one."""
    drain_s: float = 30.0
    """At SIGTERM, how long the update in hand may take to end."""
    lame_duck_s: float = 0.0
    """At SIGTERM, how long it says that it is not ready before it refuses updates: for routers that poll."""
    http_listen: TcpAddress | None = None
    """Probes and metrics over plain HTTP."""
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

    @property
    def is_guarded(self) -> bool:
        """Whether strangers can neither read along nor call."""
        return self.tls is not None and (self.tls.client_ca is not None or self.access.has_tokens)

    def __post_init__(self) -> None:
        _check_engine_url(self.engine_url)
        if self.is_exposed and not self.insecure and not self.is_guarded:
            problem = (
                f"{str(self.listen)!r} is not a loopback address: it needs TLS (--tls-certificate, --tls-key), and "
            )
            problem += "either client certificates (--tls-client-ca) or a token (--update-token-file)"
            raise ValueError(f"{problem}; or say --insecure if every host that reaches it may change the weights")
        if self.access.update_clients and (self.tls is None or self.tls.client_ca is None):
            raise ValueError("--update-clients names client certificates: it needs --tls-client-ca, which checks them")
        if self.access.look_token and not self.access.update_token:
            raise ValueError("with --look-token-file alone nobody may update: give --update-token-file too")
        update, look = self.access.update_token.text(), self.access.look_token.text()
        if look and look == update:
            raise ValueError("the update token and the look token are the same: those who look could update")
        if self.accept_checkpoint and self.require_update:
            raise ValueError("--accept-checkpoint-weights and --require-update contradict each other: give one of them")
        if self.drain_s < 0 or self.lame_duck_s < 0:
            raise ValueError("--drain-timeout and --lame-duck must not be negative")
        if self.journal_path is not None and not self.journal_path.parent.is_dir():
            raise ValueError(f"--journal {self.journal_path}: the folder does not exist; make it, for this user alone")


def _check_engine_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, or no IPv6 address
        usable = False
    if not usable:
        raise ValueError(f"--engine-url {url.rpartition('@')[2]!r} is not of the form http://host:port")
    if "@" in parts.netloc:
        raise ValueError("--engine-url must hold no password, which logs would show; keys go to --engine-api-key-file")


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


def default_listen() -> str:
    """A socket in a folder for this user alone, made on the way; ``ValueError`` if somebody else has that folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime) if runtime and os.path.isdir(runtime) else Path(tempfile.gettempdir())
    folder = parent / f"sglang-weight-sync-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        stat = folder.lstat()
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}); name a socket with --listen") from error
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise ValueError(f"{folder} is not a folder for this user alone; name another socket with --listen")
    return f"unix:{folder}/sidecar.sock"
