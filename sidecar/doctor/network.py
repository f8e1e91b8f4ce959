"""What stands between clients and the engine: another clock, a proxy from the environment.

Invariant: a proxy's address is not printed; it may hold a password.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from sidecar.doctor.finding import Check, Finding, ok, skipped, warn
from sidecar.doctor.situation import Situation

MAX_SKEW_S = 5.0


def clock(situation: Situation) -> Iterable[Finding]:
    """Whether both sides agree on what time it is; logs and deadlines of two hosts are compared by it."""
    skew_s = situation.engine.skew_s
    if skew_s is None:
        return [skipped(Check.CLOCK, "the engine does not say what time it has")]
    if abs(skew_s) <= MAX_SKEW_S:
        return [ok(Check.CLOCK, f"the engine's clock agrees within {MAX_SKEW_S:.0f} s")]
    direction = "ahead of" if skew_s > 0 else "behind"
    reason = f"the engine's clock is {abs(skew_s):.0f} s {direction} this one"
    return [warn(Check.CLOCK, reason, "let both hosts follow one time server (chrony, systemd-timesyncd)")]


def proxies(situation: Situation) -> Iterable[Finding]:
    """Whether a proxy from the environment takes calls to the engine; the sidecar's and the adapter's go past it."""
    environ = situation.host.environ
    parts = urlsplit(situation.options.engine_url)
    host, names = parts.hostname or "", (f"{parts.scheme}_proxy", "all_proxy")
    used = [name for name in (*names, *map(str.upper, names)) if environ.get(name)]
    if not used:
        return [ok(Check.PROXIES, "no proxy in this environment takes calls to the engine")]
    if _is_exempt(host, environ):
        return [ok(Check.PROXIES, f"{used[0]} is set, and no_proxy exempts {host}")]
    reason = f"{used[0]} is set and no_proxy does not name {host}: other clients' calls, such as /generate by requests "
    return [warn(Check.PROXIES, reason + "or curl, go to the proxy", f"add {host} to no_proxy and NO_PROXY")]


def _is_exempt(host: str, environ: Mapping[str, str]) -> bool:
    """As curl and requests read it: names, endings of names, and networks, joined by commas."""
    entries = f"{environ.get('no_proxy', '')},{environ.get('NO_PROXY', '')}".split(",")
    return any(_names(entry.strip().lower(), host.lower()) for entry in entries if entry.strip())


def _names(entry: str, host: str) -> bool:
    ending = entry.removeprefix("*").lstrip(".")
    if entry == "*" or host == ending or host.endswith(f".{ending}"):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
