"""How this program's own commands reach a sidecar: with or without TLS, with or without a token.

Invariant: a token is never sent unencrypted to another host.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from sidecar.config import default_listen, parse_address
from sidecar.secret import Secret
from sidecar.settings import PREFIX

# A proxy from the environment must not see calls that stay on this host.
NO_PROXY = (("grpc.enable_http_proxy", 0),)


def add_arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """The flags of ``health``, ``status`` and their like; a flag's default comes from the environment."""
    parser.add_argument(
        "--target", default=environ.get(PREFIX + "TARGET", ""), help="unix:/path.sock or host:port of the sidecar"
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (default 5)")
    for name, text in (
        ("tls-ca", "PEM that signed the sidecar's certificate: speak TLS"),
        ("tls-certificate", "PEM: this client's certificate"),
        ("tls-key", "PEM: its private key"),
        ("token-file", f"file with a bearer token (or ${PREFIX}TOKEN)"),
    ):
        default = environ.get(PREFIX + name.replace("-", "_").upper())
        parser.add_argument(f"--{name}", type=Path, default=Path(default) if default else None, help=text)


def target_of(options: argparse.Namespace) -> str:
    """Where the sidecar is: as said, or where one listens that was told nothing."""
    return str(options.target) or default_listen()


def connector(options: argparse.Namespace, environ: Mapping[str, str]) -> Callable[[str], grpc.Channel]:
    """What opens channels; raises ``ValueError`` for files that cannot be read."""
    token = Secret(path=options.token_file) if options.token_file else Secret(environ.get(PREFIX + "TOKEN", ""))
    credentials = _credentials(options)

    def connect(target: str) -> grpc.Channel:
        if credentials is not None:
            channel = grpc.secure_channel(target, credentials, options=NO_PROXY)
        else:
            if token:
                _check_stays_here(target)
            channel = grpc.insecure_channel(target, options=NO_PROXY)
        return grpc.intercept_channel(channel, _Bearer(token)) if token else channel

    return connect


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    files = (options.tls_ca, options.tls_key, options.tls_certificate)
    if not any(files):
        return None
    if (options.tls_key is None) != (options.tls_certificate is None):
        raise ValueError("--tls-certificate and --tls-key go together")
    try:
        ca, key, certificate = (path.read_bytes() if path else None for path in files)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _check_stays_here(target: str) -> None:
    address = parse_address(target)
    if not getattr(address, "is_loopback", True):
        raise ValueError(f"a token would go to {target} unencrypted: use --tls-ca")


class _Bearer(grpc.UnaryUnaryClientInterceptor):
    """Adds the token to every call."""

    def __init__(self, token: Secret) -> None:
        self._token = token

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        metadata = [*(client_call_details.metadata or ()), ("authorization", f"Bearer {self._token.text()}")]
        return continuation(client_call_details._replace(metadata=metadata), request)
