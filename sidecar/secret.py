"""A key or token: from a file, which may change while the sidecar runs, or from the environment.

Invariant: its text is in no ``repr``, message or log. A file that can no longer be read leaves the last text in force.
"""

from contextlib import suppress
from pathlib import Path


class Secret:
    """One key or token; empty: there is none."""

    def __init__(self, text: str = "", path: Path | None = None) -> None:
        """Raises ``ValueError`` for a file that cannot be read, is empty, or holds what no HTTP header can carry."""
        self._path = path
        self._seen: object = None
        self._text = _checked(text) if path is None else ""
        if path is not None:
            try:
                self._read(path)
            except OSError as error:
                raise ValueError(f"the secret's file cannot be read ({error.strerror})") from None

    def __bool__(self) -> bool:
        return self._path is not None or bool(self._text)

    def __repr__(self) -> str:
        return f"Secret({'set' if self else 'not set'})"

    def text(self) -> str:
        """As it is now; a file is read again once it was replaced or written."""
        if self._path is not None:
            with suppress(OSError, ValueError):  # half-way through being replaced
                self._read(self._path)
        return self._text

    def _read(self, path: Path) -> None:
        stat = path.stat()
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen != self._seen:
            text = _checked(path.read_text(errors="replace"))
            if not text:
                raise ValueError("the secret's file is empty")
            self._text, self._seen = text, seen


def _checked(text: str) -> str:
    text = text.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a secret must be one word of printable ASCII characters")
    return text


NO_SECRET = Secret()
