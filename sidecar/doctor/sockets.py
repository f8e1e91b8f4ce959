"""Whether a sidecar can serve where it is to, and whether one that serves already is well.

Invariant: nothing is made or removed there. A lock is tried shared, for a moment: only a sidecar that starts in that
very moment would take it for another one's.
"""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from sidecar.config import Address, TcpAddress, UnixAddress, parse_address
from sidecar.doctor.finding import Check, Finding, fail, ok, skipped, warn
from sidecar.doctor.host import Host
from sidecar.doctor.situation import Situation
from sidecar.inspect import is_serving

OTHERS = stat.S_IRWXG | stat.S_IRWXO
ANOTHER = "give this sidecar another --listen, or stop the one that is there"


def listen(situation: Situation) -> Iterable[Finding]:
    """The first thing that is wrong with the address, or that it is right."""
    if not situation.options.listen:
        return [skipped(Check.LISTEN, "--listen was not given")]
    try:
        address = parse_address(situation.options.listen)
    except ValueError as error:
        return [
            fail(
                Check.LISTEN, str(error), "give --listen unix:/run/weight-sync/sidecar.sock, in a folder that is there"
            )
        ]
    problem = next(_problems(address, situation.host), None)
    return [problem or ok(Check.LISTEN, f"a sidecar can serve at {address}")]


def _problems(address: Address, host: Host) -> Iterator[Finding]:
    match address:
        case UnixAddress(path):
            yield from _unix_problems(path, host)
        case TcpAddress():
            yield from _tcp_problems(address)


def _unix_problems(path: Path, host: Host) -> Iterator[Finding]:
    folder = path.parent
    if _is_locked(path) or _answers(path):
        yield fail(Check.LISTEN, f"another process serves at unix:{path}", ANOTHER)
    if path.exists() and not path.is_socket():
        yield fail(Check.LISTEN, f"{path} is there and is no socket", "give --listen a path of its own")
    if not os.access(folder, os.W_OK | os.X_OK):
        yield fail(
            Check.LISTEN, f"this user cannot write to {folder}", f"give it to this user: chown {host.uid} {folder}"
        )
    if folder.stat().st_mode & OTHERS:
        yield warn(Check.LISTEN, f"other users may enter {folder}", "choose a folder made for this user: mkdir -m 700")


def _is_locked(path: Path) -> bool:
    """Whether a sidecar holds the lock beside the socket."""
    try:
        with open(f"{path}.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _answers(path: Path) -> bool:
    """Whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        client.connect(str(path))
        return True
    return False


def _tcp_problems(address: TcpAddress) -> Iterator[Finding]:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.bind(place)
    except OSError as error:
        yield fail(Check.LISTEN, f"nothing can listen at {address}: {error.strerror}", ANOTHER)
    if not address.is_loopback:
        fix = (
            "use a unix socket where one host is enough; else TLS with client certificates or tokens (docs/security.md)"
        )
        yield warn(Check.LISTEN, f"other hosts reach {address}: it must be guarded", fix)


def target(situation: Situation) -> Iterable[Finding]:
    """Whether a sidecar answers there, and whether it is ready."""
    where, limit_s = situation.options.target, situation.options.timeout_s
    if not where:
        return [skipped(Check.TARGET, "--target was not given")]
    lives, why = is_serving(where, liveness=True, timeout_s=limit_s / 2)
    if not lives:
        return [
            fail(Check.TARGET, why.partition(";")[0], "start it with `sglang-weight-sync serve`, or correct --target")
        ]
    ready, why = is_serving(where, liveness=False, timeout_s=limit_s / 4)
    if ready:
        return [ok(Check.TARGET, f"the sidecar at {where} is ready")]
    return [warn(Check.TARGET, f"the sidecar at {where} is not ready: {why}", "see `sglang-weight-sync status`")]
