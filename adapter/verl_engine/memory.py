"""What of the engine's GPU memory is released, as one rank was told.

Pure. SGLang itself checks nothing here: it dies of a release while a request runs, of a resume of what was not
released, and of generation or loading into memory that is not there. Invariant: what passes these checks is none of
those, as long as all ranks make the same calls.
"""

from collections.abc import Sequence

WEIGHTS = "weights"
TAGS = ("kv_cache", WEIGHTS, "cuda_graph")


class MemoryState:
    """Which tags are released, and whether the weights have content."""

    def __init__(self) -> None:
        self._released: list[str] = []
        self._weights_lost = False

    @property
    def released(self) -> tuple[str, ...]:
        """In the order of their release."""
        return tuple(self._released)

    @property
    def weights_lost(self) -> bool:
        """Whether they are whatever the memory holds."""
        return self._weights_lost

    def to_release(self, tags: Sequence[str] | str | None) -> list[str]:
        """Those that are not released yet; None names all. Raises ``ValueError`` for an unknown one."""
        return [tag for tag in _named(tags, TAGS) if tag not in self._released]

    def to_resume(self, tags: Sequence[str] | str | None) -> list[str]:
        """Those that are released; None names all of them. Raises ``ValueError`` for an unknown one."""
        return [tag for tag in _named(tags, self._released) if tag in self._released]

    def mark_released(self, tags: Sequence[str]) -> None:
        """SGLang has released them."""
        self._released += tags

    def mark_resumed(self, tags: Sequence[str], *, keeps_weights: bool) -> None:
        """SGLang has them back; weights without a backup come back as whatever the memory holds."""
        self._released = [tag for tag in self._released if tag not in tags]
        self._weights_lost |= WEIGHTS in tags and not keeps_weights

    def mark_updated(self) -> None:
        """All weights were written, or the caller knows which were not."""
        self._weights_lost = False

    def check_update(self) -> None:
        """Raise ``ValueError`` if there is no memory to write weights to."""
        if WEIGHTS in self._released:
            raise ValueError(
                "the engine's weights are released; call resume_memory_occupation(['weights']) before an update"
            )

    def check_generate(self) -> None:
        """Raise ``ValueError`` if the engine has nothing to generate with."""
        if self._released:
            raise ValueError(
                f"the engine's {' and '.join(self._released)} memory is released; call resume_memory_occupation() first"
            )
        if self._weights_lost:
            raise ValueError(
                "the engine's weights were released without a backup and have not been sent since; update them first, "
                "or start the server with enable_weights_cpu_backup=True"
            )


def _named(tags: Sequence[str] | str | None, default: Sequence[str]) -> list[str]:
    named = list(default) if tags is None else [tags] if isinstance(tags, str) else list(dict.fromkeys(tags))
    for tag in named:
        if tag not in TAGS:
            raise ValueError(f"{tag!r} is no kind of the engine's memory; there are {', '.join(TAGS)}")
    return named
