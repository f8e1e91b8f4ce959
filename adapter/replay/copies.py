"""Many copies, prepared once and then made as fast as the device can.

Owns how they are launched, not what they are. What is contiguous on both sides is copied as bytes: neighbours are
joined, words are as wide as alignment allows, large ranges go to ``copy_`` and small ones into ``_foreach_copy_``. On a
GPU the whole is a CUDA graph from the second run on, since launching thousands of copies takes longer than making them.

Invariant: ``run`` gives what ``target.copy_(source)`` one by one would; targets do not overlap.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

LARGE_BYTES = 16 << 20
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)

Pair = tuple[torch.Tensor, torch.Tensor]
"""Target and source."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes that follow each other on both sides."""

    target: torch.UntypedStorage
    source: torch.UntypedStorage
    to: int
    start: int
    length: int

    def joins(self, other: "_Span") -> bool:
        """Whether ``other`` follows right after this one, on both sides."""
        same = self.target.data_ptr() == other.target.data_ptr() and self.source.data_ptr() == other.source.data_ptr()
        return same and self.to + self.length == other.to and self.start + self.length == other.start


class Copies:
    """Prepared copies between two sets of memory, which must stay where they are."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        listed = list(pairs)
        spans = _joined(_span(pair) for pair in listed if _is_plain(pair))
        words = [_as_words(span) for span in spans]
        self._one_by_one = [pair for pair in listed if not _is_plain(pair)]
        self._one_by_one += [pair for pair in words if pair[0].nbytes >= LARGE_BYTES]
        self._batches = _by_dtype(pair for pair in words if pair[0].nbytes < LARGE_BYTES)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._may_be_captured = bool(listed) and listed[0][0].is_cuda
        self._has_run = False

    def __len__(self) -> int:
        """How many there are, neighbours as one."""
        return len(self._one_by_one) + sum(len(targets) for targets, _ in self._batches)

    def run(self) -> None:
        """Make them, on the current stream; returns before a GPU has."""
        if self._graph is None and self._has_run and self._may_be_captured:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._launch()
        self._has_run = True

    def _launch(self) -> None:
        for target, source in self._one_by_one:
            target.copy_(source)
        for targets, sources in self._batches:
            torch._foreach_copy_(targets, sources)

    def _capture(self) -> None:
        """Once; where it does not work they are launched as before."""
        self._may_be_captured = False
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch()
        except RuntimeError as error:
            logger.warning("the copies of a replay cannot be captured (%s); they are launched one by one", error)
        else:
            self._graph = graph


def _is_plain(pair: Pair) -> bool:
    target, source = pair
    same = target.dtype == source.dtype and target.shape == source.shape and target.device == source.device
    return same and target.is_contiguous() and source.is_contiguous()


def _span(pair: Pair) -> _Span:
    target, source = pair
    to, start = (tensor.storage_offset() * tensor.element_size() for tensor in pair)
    return _Span(target.untyped_storage(), source.untyped_storage(), int(to), int(start), target.nbytes)


def _joined(spans: Iterable[_Span]) -> Iterator[_Span]:
    """Neighbours as one."""
    last: _Span | None = None
    for span in sorted(spans, key=lambda span: (span.source.data_ptr(), span.start)):
        if last is not None and last.joins(span):
            last = _Span(last.target, last.source, last.to, last.start, last.length + span.length)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _as_words(span: _Span) -> Pair:
    word = next(word for word in _WORDS if not _misaligned(span, word.itemsize))
    return _words(span.target, span.to, span.length, word), _words(span.source, span.start, span.length, word)


def _misaligned(span: _Span, itemsize: int) -> int:
    addresses = (span.target.data_ptr(), span.source.data_ptr(), span.to, span.start, span.length)
    return any(address % itemsize for address in addresses)


def _words(storage: torch.UntypedStorage, start: int, length: int, word: torch.dtype) -> torch.Tensor:
    empty = torch.empty(0, dtype=word, device=storage.device)
    return empty.set_(storage, start // word.itemsize, (length // word.itemsize,), (1,))


def _by_dtype(pairs: Iterable[Pair]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    batches: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in pairs:
        targets, sources = batches.setdefault(target.dtype, ([], []))
        targets.append(target)
        sources.append(source)
    return list(batches.values())
