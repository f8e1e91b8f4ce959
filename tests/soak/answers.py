"""Whether what the server answered is what it was given, told by the times at which versions could be served.

Pure. Invariants: an answer names only versions that were served at some moment of its life; two answers to the same
prompt that were made from one content alone are the same; a request fails only if its server was killed under it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the server."""

    started: float
    finished: float
    versions: tuple[str, ...]
    """Whose weights made its tokens, in order."""
    tokens: tuple[int, ...]
    is_probe: bool
    """Whether it answers the prompt that every probe asks."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One request without an answer."""

    started: float
    finished: float
    what: str


@dataclass(slots=True)
class Served:
    """One version, from when it could first be served until it could be no more."""

    version: str
    digest: str
    since: float
    until: float = math.inf


@dataclass(slots=True)
class ServedVersions:
    """What could be served when; the driver's side of the story."""

    spans: list[Served] = field(default_factory=list)
    outages: list[tuple[float, float]] = field(default_factory=list)
    """When the server was killed, and when it was back."""

    def published(self, version: str, digest: str, since: float, superseded: float) -> None:
        """``version`` is served: its update began at ``since``, and nothing else is served after ``superseded``."""
        for span in self.spans:
            span.until = min(span.until, superseded)
        self.spans.append(Served(version, digest, since))

    def perhaps_published(self, version: str, digest: str, since: float) -> None:
        """An update whose sidecar was killed: it may have been published before."""
        self.spans.append(Served(version, digest, since))

    def digest_of(self, answer: Answer) -> str | None:
        """The content that made all of an answer; None if that was not one alone, or is not known."""
        found = [span.digest for span in self.spans if (span.version,) == answer.versions and _overlap(span, answer)]
        return found[0] if len(found) == 1 and found[0] else None


def complaints(answers: Sequence[Answer], failures: Iterable[Failure], served: ServedVersions) -> list[str]:
    """Everything that must not be, in sentences."""
    return [*_wrong_versions(answers, served), *_wrong_tokens(answers, served), *_unexplained(failures, served)]


def _wrong_versions(answers: Iterable[Answer], served: ServedVersions) -> Iterator[str]:
    for answer in answers:
        for version in answer.versions:
            if not any(span.version == version and _overlap(span, answer) for span in served.spans):
                yield f"{answer} names version {version}, which was not served then"


def _wrong_tokens(answers: Iterable[Answer], served: ServedVersions) -> Iterator[str]:
    first: dict[str, Answer] = {}
    for answer in answers:
        digest = served.digest_of(answer) if answer.is_probe else None
        if digest is not None and first.setdefault(digest, answer).tokens != answer.tokens:
            yield f"content {digest} gave {first[digest]}, then {answer}"


def _unexplained(failures: Iterable[Failure], served: ServedVersions) -> Iterator[str]:
    for failure in failures:
        if not any(begin <= failure.finished and failure.started <= end for begin, end in served.outages):
            yield f"a request of {failure.started:.1f}..{failure.finished:.1f} failed: {failure.what}"


def _overlap(span: Served, answer: Answer) -> bool:
    return span.since <= answer.finished and answer.started <= span.until
