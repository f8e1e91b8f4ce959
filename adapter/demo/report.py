"""What a person sees of the demo. Owns the wording and the tally of checks; knows no process."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from adapter.demo.trainers import RankReport

_LABEL_WIDTH = 10


class Report:
    """Prints as things happen and remembers which checks failed."""

    def __init__(self) -> None:
        self.num_checks = 0
        self.failed: list[str] = []

    def title(self, text: str) -> None:
        """The headline."""
        print(f"\n{text}\n{'=' * len(text)}", flush=True)

    def line(self, text: str) -> None:
        """One remark."""
        print(f"  {text}", flush=True)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Says what is being started, and how long it took."""
        print(f"  starting {what} ... ", end="", flush=True)
        started = time.monotonic()
        yield
        print(f"up in {time.monotonic() - started:.1f} s", flush=True)

    def tokens(self, label: str, tokens: Sequence[int]) -> None:
        """What the server answers with the weights it has now."""
        print(f"\n  {label:{_LABEL_WIDTH}} tokens {' '.join(f'{token:3d}' for token in tokens)}", flush=True)

    def update(self, label: str, tokens: Sequence[int], report: RankReport, posts: int, seconds: float) -> None:
        """One update's tokens and times."""
        self.tokens(label, tokens)
        phases = ", ".join(f"{name} {spent * 1000:.0f}" for name, spent in report.phases.items())
        indent = " " * (_LABEL_WIDTH + 3)
        self.line(f"{indent[2:]}{posts} POST, {seconds * 1000:.0f} ms for the trainers; by phase, in ms: {phases}")

    def check(self, what: str, holds: bool) -> None:
        """One thing that must be true."""
        self.num_checks += 1
        if not holds:
            self.failed.append(what)
        print(f"    [{'ok' if holds else 'FAILED'}] {what}", flush=True)

    def verdict(self) -> bool:
        """The last word; whether all was well."""
        passed = self.num_checks - len(self.failed)
        print(f"\n{passed} of {self.num_checks} checks hold.", flush=True)
        for what in self.failed:
            print(f"  FAILED: {what}", flush=True)
        return not self.failed
