"""Who belongs to a fleet: a list, the addresses behind a DNS name, or what a function says (Ray actors, an API).

Asked at the beginning of every update, so that engines may come and go. Raises nothing for a name that has no address
just now: a fleet without members is told by the update.
"""

import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

logger = logging.getLogger(__name__)


class Discovery(Protocol):
    """Something that knows the members."""

    def targets(self) -> Sequence[str]:
        """Where their sidecars listen now: ``host:port`` or ``unix:/path.sock``."""


class Listed:
    """Always the same."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._targets = tuple(dict.fromkeys(targets))
        if not self._targets:
            raise ValueError("a fleet needs at least one sidecar")

    def targets(self) -> Sequence[str]:
        """The list."""
        return self._targets


class Dns:
    """Every address of a name, as a headless Kubernetes Service gives one for each pod.

    Let the Service publish addresses that are not ready (``publishNotReadyAddresses: true``): an engine that waits for
    its first weights is not.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    def targets(self) -> Sequence[str]:
        """Looked up anew, sorted."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            logger.warning("%s has no address now: %s", self._host, error)
            return ()
        return sorted({_target(str(address[0]), self._port) for *_, address in found})


class Asked:
    """Whatever a function says, such as one that asks Ray actors where their sidecars listen."""

    def __init__(self, ask: Callable[[], Iterable[str]]) -> None:
        self._ask = ask

    def targets(self) -> Sequence[str]:
        """Asked anew."""
        return tuple(dict.fromkeys(self._ask()))


def _target(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
