"""Who may call what. Pure: decides from a call's method, its metadata and what its connection has proven.

Two roles: LOOK (what it does, how it went) and UPDATE (everything). A caller must satisfy every rule that is set: bring
a token where there are tokens, be named where clients are named. Invariant: a method that is in no list needs UPDATE.
"""

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from sidecar.config import AccessRules
from sidecar.errors import Forbidden, Reason, Unauthenticated
from sidecar.secret import Secret

AUTHORIZATION, BEARER = "authorization", "bearer "
SERVICE = "/sidecar.v1.WeightSyncService/"
LOOKS = frozenset(SERVICE + name for name in ("GetCapabilities", "GetStatus", "GetUpdate"))
LOOK_SERVICES = ("/grpc.reflection.",)
# Probes cannot bring a token, and learn one word.
OPEN_SERVICES = ("/grpc.health.v1.Health/",)

Metadata = Iterable[tuple[str, str | bytes]]


class Role(IntEnum):
    """Each includes those before it."""

    NOBODY = 0
    LOOK = 1
    UPDATE = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call, as far as that is proven."""

    name: str = ""
    """From a client certificate; empty: it has none."""
    role: Role = Role.UPDATE


def needed(method: str) -> Role:
    """The role that a method wants."""
    if method.startswith(OPEN_SERVICES):
        return Role.NOBODY
    return Role.LOOK if method in LOOKS or method.startswith(LOOK_SERVICES) else Role.UPDATE


def admit(rules: AccessRules, method: str, metadata: Metadata, proven: Mapping[str, Iterable[bytes]]) -> Caller:
    """The caller, who may make this call; raises ``Unauthenticated`` or ``Forbidden``."""
    names = names_of(proven)
    caller = Caller(names[0] if names else "", min(_by_token(rules, metadata), _by_name(rules, names)))
    if caller.role < needed(method):
        message = f"{method.rpartition('/')[2]} needs the right to update, and {caller.name or 'this caller'} may only "
        message += "look; use the update token, or have its name added to --update-clients"
        raise Forbidden(Reason.NOT_ALLOWED, message, caller=caller.name)
    return caller


def names_of(proven: Mapping[str, Iterable[bytes]]) -> list[str]:
    """What a client certificate calls its owner: its alternative names, or its common name if it has none."""
    found = proven.get("x509_subject_alternative_name") or proven.get("x509_common_name") or ()
    return [name.decode(errors="replace") for name in found]


def _by_token(rules: AccessRules, metadata: Metadata) -> Role:
    if not rules.has_tokens:
        return Role.UPDATE
    token = _token(metadata)
    for secret, role in ((rules.look_token, Role.LOOK), (rules.update_token, Role.UPDATE)):  # the same text: the lesser
        if _is(token, secret):
            return role
    problem = "is not one that this sidecar accepts" if token else "is missing"
    message = f"the token {problem}: send 'authorization: Bearer TOKEN' (adapters: Credentials(token_file=...))"
    raise Unauthenticated(Reason.TOKEN_WRONG, message)


def _by_name(rules: AccessRules, names: list[str]) -> Role:
    allowed = rules.update_clients
    return Role.UPDATE if not allowed or not set(allowed).isdisjoint(names) else Role.LOOK


def _token(metadata: Metadata) -> str:
    for key, value in metadata:
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        if key == AUTHORIZATION and text[: len(BEARER)].lower() == BEARER:
            return text[len(BEARER) :].strip()
    return ""


def _is(token: str, secret: Secret) -> bool:
    """Compared in constant time; what is not set, nobody has."""
    return bool(secret) and hmac.compare_digest(token.encode(), secret.text().encode())
