"""Watches a model load a bucket, and tells whether that was nothing but copies.

``SourceTensor`` is what the model is given: a view of the bucket that is known as such in every thread and after every
view. ``Recorder`` is a dispatch mode around the load. Together they see each operation that touches the bucket or the
model, and let pass three kinds: views, ``copy_`` from the bucket into the model, and constants written into the model.
Anything else ends in a refusal, not in an error: the load itself goes on undisturbed.

Invariant: a recording without a refusal holds everything that this load has written into the model, in its order, but
for what other threads do with the model alone, which a first replay shows (``plan``).
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from adapter.replay.reachable import ModelTensors

_aten = torch.ops.aten
_FILLS = (_aten.fill_.Scalar, _aten.zero_.default)


@dataclass(frozen=True, slots=True)
class Copy:
    """Part of the bucket into part of the model."""

    target: torch.Tensor
    source: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fill:
    """One number into part of the model."""

    target: torch.Tensor
    value: float


Write = Copy | Fill


@dataclass(slots=True)
class Recording:
    """What was seen."""

    writes: list[Write] = field(default_factory=list)
    """In their order."""
    refusal: str = ""
    """Why they cannot stand for the load; empty if they can."""

    def refuse(self, why: str) -> None:
        """The first reason counts."""
        self.refusal = self.refusal or why


class SourceTensor(torch.Tensor):
    """A view of the bucket that says so. ``plain``: the same as an ordinary tensor."""

    plain: torch.Tensor
    recording: Recording

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, plain: torch.Tensor, recording: Recording) -> Self:
        """Mark ``plain``."""
        marked: Self = torch.Tensor._make_subclass(cls, plain)
        marked.plain, marked.recording = plain, recording
        return marked

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Reached where no recorder is: in another thread, or under a mode that hides it."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, SourceTensor):
                where = threading.current_thread().name
                leaf.recording.refuse(f"the model loads in a thread of its own ({where}), where copies are not seen")
        return func(*_plain(args), **_plain(kwargs or {}))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active while the model loads, in this thread."""

    def __init__(self, flat: torch.Tensor, tensors: ModelTensors, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source = flat.untyped_storage().data_ptr()
        self._tensors = tensors
        self._recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = _plain(args), _plain(kwargs or {})
        result = func(*args, **kwargs)
        self._judge(func, args, list(_tensors(args, kwargs)), result)
        return tree_map_only(torch.Tensor, self._marked, result)

    def _judge(self, func: Any, args: Sequence[Any], tensors: Sequence[torch.Tensor], result: Any) -> None:
        if not any(self._is_source(tensor) or self._tensors.has(tensor) for tensor in tensors):
            return
        if func is _aten.copy_.default:
            self._judge_copy(args[0], args[1])
        elif func in _FILLS and not self._is_source(args[0]):
            self._recording.writes.append(Fill(args[0], args[1] if len(args) > 1 else 0))
        elif not self._is_view(func, result):
            self._recording.refuse(f"the model does more with its weights than to copy them ({func})")

    def _judge_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._tensors.has(target) and self._is_source(source):
            self._recording.writes.append(Copy(target, source))
        elif self._tensors.has(target):
            self._recording.refuse("the model writes weights that do not come from the bucket as they are")
        else:
            self._recording.refuse("the model copies weights to somewhere else than its own tensors")

    def _is_view(self, func: Any, result: Any) -> bool:
        """Whether nothing but other views of known memory came of it."""
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        known = all(self._is_source(output) or self._tensors.has(output) for output in outputs)
        return bool(outputs) and known and not func._schema.is_mutable

    def _is_source(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._source

    def _marked(self, tensor: torch.Tensor) -> torch.Tensor:
        return SourceTensor.of(tensor, self._recording) if self._is_source(tensor) else tensor


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def _plain(tree: Any) -> Any:
    return tree_map_only(SourceTensor, lambda tensor: tensor.plain, tree)
