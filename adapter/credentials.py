"""How a trainer's process proves to a sidecar who it is, and encrypts what it says.

Invariant: a token is never sent unencrypted to another host, and is in no ``repr``.
"""

import ipaddress
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

AUTHORIZATION = "authorization"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """For a sidecar that was started with TLS or with tokens; the files are PEM, and read when a channel is opened."""

    ca: Path | None = None
    """What signed the sidecar's certificate: TLS is spoken. Without it the system's authorities, if ``tls``."""
    tls: bool = False
    """Whether to speak TLS also without ``ca``."""
    certificate: Path | None = None
    """This client's, for mTLS; with ``key``."""
    key: Path | None = None
    token_file: Path | None = None
    """With a bearer token; read for every call, since it may change."""
    token: str = field(default="", repr=False)
    """The token itself, in place of a file."""
    server_name: str = ""
    """The name that the sidecar's certificate must have, where it is not what the sidecar is addressed by: many of them
    behind one DNS name are addressed by number, and have one certificate."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if self.token and self.token_file:
            raise ValueError("give token or token_file, not both")
        if self.server_name and not self.speaks_tls:
            raise ValueError("server_name is about TLS: give ca=, or tls=True")

    @property
    def speaks_tls(self) -> bool:
        """Whether the channel is encrypted."""
        return self.tls or self.ca is not None or self.certificate is not None

    def channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel; raises ``ValueError`` for a token that would be sent in clear, ``OSError`` for files."""
        if self.speaks_tls:
            named = [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
            channel = grpc.secure_channel(target, self._tls(), options=[*options, *named])
        else:
            if self._has_token and not _stays_here(target):
                raise ValueError(f"the token would go to {target} unencrypted: give ca=, or tls=True")
            channel = grpc.insecure_channel(target, options=options)
        return grpc.intercept_channel(channel, _Bearer(self._read_token)) if self._has_token else channel

    @property
    def _has_token(self) -> bool:
        return bool(self.token or self.token_file)

    def _read_token(self) -> str:
        return "".join(self.token_file.read_text().split()) if self.token_file else self.token

    def _tls(self) -> grpc.ChannelCredentials:
        ca, key, certificate = (path.read_bytes() if path else None for path in (self.ca, self.key, self.certificate))
        return grpc.ssl_channel_credentials(ca, key, certificate)


NO_CREDENTIALS = Credentials()


def _stays_here(target: str) -> bool:
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Bearer(grpc.UnaryUnaryClientInterceptor):
    """Adds the token to every call."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._read = token
        self._text = token()

    def _token(self) -> str:
        """As it is now; while its file is being replaced, as it was."""
        with suppress(OSError):
            self._text = self._read() or self._text
        return self._text

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        metadata = [*(client_call_details.metadata or ()), (AUTHORIZATION, f"Bearer {self._token()}")]
        return continuation(client_call_details._replace(metadata=metadata), request)
