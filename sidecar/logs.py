"""The sidecar's own log on standard error: one line for people, or one JSON object for machines.

Owns the handler of the "sidecar" loggers and no other. Invariant: a record begins a line and nothing in it can look
like another record, whatever is in a trainer's ids; ``FIELDS`` that a call gives as ``extra`` are in it by name.
"""

import json
import logging
import re
import sys
import time
from enum import Enum
from typing import TextIO

FIELDS = ("update_id", "version", "rank", "bucket", "phase", "reason")
LOGGER = "sidecar"
_PLAIN = re.compile(r"[\w.:/+@-]+", re.ASCII)


class LogForm(Enum):
    """How a record is written."""

    TEXT = "text"
    JSON = "json"


def configure(level: str, form: LogForm, out: TextIO | None = None) -> None:
    """Write the sidecar's records of ``level`` and above; ``serve`` does so once. The root logger is left alone."""
    handler = logging.StreamHandler(out or sys.stderr)
    handler.setFormatter(_Json() if form is LogForm.JSON else _Text())
    logger = logging.getLogger(LOGGER)
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def one_line(text: str) -> str:
    """``text`` with everything escaped that would end a line, or be obeyed by a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


class _Text(logging.Formatter):
    """Time, level, logger, message, fields; a traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_when(record)} {record.levelname} {record.name}: {one_line(record.getMessage())}"
        if fields := _fields(record):
            line += " [" + " ".join(f"{name}={_value(value)}" for name, value in fields.items()) + "]"
        if record.exc_info:
            line += "".join(f"\n  {one_line(part)}" for part in self.formatException(record.exc_info).splitlines())
        return line


class _Json(logging.Formatter):
    """The same as an object."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {"ts": _when(record), "level": record.levelname.lower(), "logger": record.name}
        entry |= {"message": record.getMessage()} | _fields(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _when(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}


def _value(value: object) -> str:
    """As it is, or quoted where it could be taken for something else."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
