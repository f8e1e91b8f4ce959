"""The settings of ``serve``: one table, read from flags, then the environment, then a file.

Owns their names, kinds and defaults; ``docs/configuration.md`` is made from it (``python -m sidecar.settings``).
Invariant: a name that is in no row is an error, wherever it was given; a secret's text is accepted from a file or the
environment only.
"""

import argparse
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from sidecar.config import Limits, Timeouts
from sidecar.secret import Secret

PREFIX = "SGLANG_WEIGHT_SYNC_"
# Of this prefix, but no setting of ``serve``: see ``cli``.
OTHER_VARIABLES = frozenset({"REEXECUTED", "TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERTIFICATE", "TLS_KEY", "TARGET"})
# What Kubernetes sets in every pod beside a Service of that name.
SERVICE_LINK = re.compile(PREFIX + r"(SERVICE_(HOST|PORT)(_.*)?|PORT(_.*)?)")
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Kind(Enum):
    """How a setting's text is read."""

    TEXT = auto()
    NAMES = auto()
    PATH = auto()
    SECONDS = auto()
    COUNT = auto()
    SWITCH = auto()
    SECRET = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row."""

    name: str
    """Of the flag, without its dashes."""
    help: str
    kind: Kind = Kind.TEXT
    default: str | float | bool = ""
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """In the file; a secret's is that of its file."""
        return self.name.replace("-", "_") + ("_file" if self.kind is Kind.SECRET else "")

    @property
    def flag(self) -> str:
        """On the command line."""
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        """In the environment."""
        return PREFIX + self.key.upper()


def _rows() -> tuple[Setting, ...]:
    def row(name: str, text: str, kind: Kind = Kind.TEXT, default: str | float | bool = "", *choices: str) -> Setting:
        return Setting(name=name, help=text, kind=kind, default=default, choices=choices)

    timeouts, limits = Timeouts(), Limits()
    return (
        row("engine-url", "the SGLang server, such as http://127.0.0.1:30000; required"),
        row("listen", "unix:/path.sock, or host:port (port 0: any); empty: a socket in a folder of this user's"),
        row("http-listen", "host:port for /livez, /readyz and /metrics over plain HTTP; empty: not served"),
        row("engine-api-key", "SGLang's --api-key", Kind.SECRET),
        row("engine-admin-key", "SGLang's --admin-api-key", Kind.SECRET),
        row("tls-certificate", "PEM: this sidecar's certificate and chain; read again when it changes", Kind.PATH),
        row("tls-key", "PEM: its private key", Kind.PATH),
        row("tls-client-ca", "PEM: clients must show a certificate that this has signed", Kind.PATH),
        row("update-clients", "NAME,NAME: clients by SAN or CN that may update; others only look", Kind.NAMES),
        row("update-token", "bearer token of those who may update", Kind.SECRET),
        row("look-token", "bearer token of those who may only look", Kind.SECRET),
        row("insecure", "let --listen be reached from other hosts though nothing guards it", Kind.SWITCH, False),
        row("gpu-uuids", "GPU-a,GPU-b,...: the engine's, one per TP rank; empty: found out", Kind.NAMES),
        row("replay", "use the engine's replay loader, where it has one", Kind.SWITCH, True),
        row("accept-checkpoint-weights", "a restarted engine is ready with its checkpoint", Kind.SWITCH, False),
        row("require-update", "an engine is not ready before its first complete update", Kind.SWITCH, False),
        row("journal", "file that says an update is being applied; empty: SOCKET.journal, on TCP none", Kind.PATH),
        row("drain-timeout", "at SIGTERM, for the update in hand", Kind.SECONDS, 30.0),
        row("lame-duck", "at SIGTERM, not ready for so long before updates are refused", Kind.SECONDS, 0.0),
        row("log-level", "of the sidecar's own log", Kind.TEXT, "info", "debug", "info", "warning", "error"),
        row("log-format", "one line for people, or one JSON object", Kind.TEXT, "text", "text", "json"),
        row("max-message-bytes", "of one gRPC request", Kind.COUNT, limits.message_bytes),
        row("max-tensors", "of one manifest", Kind.COUNT, limits.tensors),
        row("max-buckets", "of one manifest", Kind.COUNT, limits.buckets),
        row("max-open-calls", "at a time; health apart", Kind.COUNT, limits.open_calls),
        *(
            row(f"{phase}-timeout", f"for phase {phase}", Kind.SECONDS, getattr(timeouts, phase))
            for phase in Timeouts.__dataclass_fields__
        ),
    )


SETTINGS = _rows()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Every setting as a flag; one that is not given leaves nothing behind."""
    parser.add_argument("--config", type=Path, help=f"TOML file with settings (or ${PREFIX}CONFIG)")
    for setting in SETTINGS:
        told = f" (default: {_shown(setting.default)})" if setting.default != "" else ""
        text = (setting.help + told).replace("%", "%%")
        if setting.kind is Kind.SWITCH:
            parser.add_argument(
                setting.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            parser.add_argument(
                setting.flag, default=argparse.SUPPRESS, metavar=_metavar(setting), help=text, dest=setting.key
            )


def resolve(options: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Any]:
    """Setting's name -> value, from the first of flag, environment, file and default that has one.

    Raises ``ValueError`` for an unknown name or a value that cannot be read, and says where it was given.
    """
    given = vars(options)
    config = given.get("config") or _path(environ.get(PREFIX + "CONFIG", ""))
    in_file = _file(config) if config else {}
    _check_variables(environ)
    return {setting.name: _value(setting, given, environ, in_file, config) for setting in SETTINGS}


def _value(
    setting: Setting,
    given: Mapping[str, Any],
    environ: Mapping[str, str],
    in_file: Mapping[str, Any],
    config: Path | None,
) -> Any:
    if setting.key in given:
        return _read(setting, given[setting.key], setting.flag)
    if setting.kind is Kind.SECRET and (variable := setting.variable.removesuffix("_FILE")) in environ:
        return _given(Secret(environ[variable]), variable)
    if setting.variable in environ:
        return _read(setting, environ[setting.variable], setting.variable)
    if setting.key in in_file:
        return _read(setting, in_file[setting.key], f"{config}: {setting.key}")
    return Secret() if setting.kind is Kind.SECRET else _read(setting, setting.default, setting.flag)


def _read(setting: Setting, value: Any, where: str) -> Any:
    match setting.kind:
        case Kind.SECRET:
            return _secret(value, where)
        case Kind.PATH:
            return _path(_text(value, where))
        case Kind.NAMES:
            names = value if isinstance(value, list) else _text(value, where).split(",")
            kept = tuple(name.strip() for name in names if _text(name, where).strip())
            if value and not kept:
                raise ValueError(f"{where} names nobody; leave it out, or name somebody")
            return kept
        case Kind.SECONDS:
            return _number(value, where)
        case Kind.COUNT:
            return _count(value, where)
        case Kind.SWITCH:
            return _switch(value, where)
        case Kind.TEXT:
            text = _text(value, where)
            if setting.choices and text not in setting.choices:
                raise ValueError(f"{where}: {text!r} is none of {', '.join(setting.choices)}")
            return text


def _secret(value: Any, where: str) -> Secret:
    """From the file of that name; what is in ``value`` is never told, since it may be the secret itself by mistake."""
    try:
        return _given(Secret(path=Path(_text(value, where))), where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _given(secret: Secret, where: str) -> Secret:
    """An empty one would leave a door open that somebody meant to close."""
    if not secret:
        raise ValueError(f"{where} is empty; leave it out, or give the secret")
    return secret


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, not {value!r}")
    return value


def _number(value: Any, where: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise ValueError(f"{where}: {value!r} is not a number of seconds")
    return number


def _count(value: Any, where: str) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{where}: {value!r} is not a whole number") from None


def _switch(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in YES + NO:
        return str(value).lower() in YES
    raise ValueError(f"{where}: {value!r} is neither true nor false")


def _file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not TOML: {error}") from error
    known = {setting.key for setting in SETTINGS}
    for key in values:
        if key not in known:
            raise ValueError(f"--config {path}: there is no setting {key!r}{_meant(key, known)}")
    return values


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {setting.variable for setting in SETTINGS} | {PREFIX + name for name in (*OTHER_VARIABLES, "CONFIG")}
    known |= {setting.variable.removesuffix("_FILE") for setting in SETTINGS if setting.kind is Kind.SECRET}
    for name in environ:
        if name.startswith(PREFIX) and name not in known and not SERVICE_LINK.fullmatch(name):
            raise ValueError(f"the environment has {name}, which is no setting{_meant(name, known)}")


def _meant(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; is {close[0]} meant?" if close else ""


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    return {Kind.SECONDS: "S", Kind.COUNT: "N", Kind.PATH: "PATH", Kind.SECRET: "PATH"}.get(setting.kind, "TEXT")


def _shown(default: str | float | bool) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def table() -> str:
    """Every setting as Markdown."""
    lines = ["| flag | environment | key in the file | default | |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        secret = setting.kind is Kind.SECRET
        variable = f"`{setting.variable}`"
        if secret:
            variable = f"`{setting.variable.removesuffix('_FILE')}`, or {variable}"
        flag = setting.flag + (" / --no-" + setting.name if setting.kind is Kind.SWITCH else "")
        default = f"`{_shown(setting.default)}`" if setting.default != "" else ""
        about = ("file with " if secret else "") + setting.help + (", seconds" if setting.kind is Kind.SECONDS else "")
        lines.append(f"| `{flag}` | {variable} | `{setting.key}` | {default} | {about} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201 - for `make docs`
