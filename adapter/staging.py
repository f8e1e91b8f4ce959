"""Tensors -> one bucket of exportable memory, as the plan says.

Invariant: what is staged is exactly what the manifest promised; anything else is a ``ValueError`` before it is sent.
"""

from collections.abc import Iterator

import torch

from adapter.exports import Export, allocate
from adapter.planner import Bucket, Placement


def stage(bucket: Bucket, tensors: Iterator[tuple[str, torch.Tensor]], device: torch.device) -> Export:
    """Copy the next tensors into new exportable memory on ``device``."""
    export = allocate(bucket.num_bytes, device)
    sources = [_next(place, tensors) for place in bucket.placements]
    torch._foreach_copy_([_view(export.flat, place) for place in bucket.placements], sources)
    return export


def expect_end(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Raise ``ValueError`` if there are tensors that the plan does not have: they would be lost silently."""
    surplus = next(tensors, None)
    if surplus is not None:
        raise ValueError(f"named_tensors yields {surplus[0]} after the last of specs; list it there")


def _view(flat: torch.Tensor, place: Placement) -> torch.Tensor:
    end = place.byte_offset + place.spec.num_bytes
    return flat[place.byte_offset : end].view(place.spec.dtype).view(place.spec.shape)


def _next(place: Placement, tensors: Iterator[tuple[str, torch.Tensor]]) -> torch.Tensor:
    spec = place.spec
    expected = f"tensor {spec.name} {spec.dtype} {list(spec.shape)}"
    pair = next(tensors, None)
    if pair is None:
        raise ValueError(f"expected {expected} next, but named_tensors has ended")
    name, tensor = pair
    if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
        raise ValueError(f"expected {expected} next, but got {name} {tensor.dtype} {list(tensor.shape)}")
    return tensor.detach()
