"""What can be wrong with the tensors of an update, told before any byte of it moves.

Pure but for reading the tensors. Invariant: a problem is a ``ValueError`` of one sentence that names the tensor.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, ge

import torch

from adapter.sources.lazy import LazyTensor

_ELEMENTS_AT_A_TIME = 1 << 22
_HOST = torch.device("cpu")
_device = attrgetter("device")
_HOLDS_ELEMENTS = (torch.strided,)


def check_tensors(tensors: Mapping[str, LazyTensor], device: torch.device) -> None:
    """Refuse what cannot be copied to ``device``: meta tensors, other layouts, other GPUs, freed memory."""
    if device.type == "cuda":
        refuse_forked_cuda()
    for name, tensor in tensors.items():
        for local in tensor.local_tensors():
            if problem := _problem(local, device):
                raise ValueError(f"tensor {name} {problem}")


def check_finite(tensors: Mapping[str, LazyTensor]) -> None:
    """Refuse NaN and infinity, in what this rank itself holds; takes no memory to speak of."""
    for name, tensor in tensors.items():
        if not all(_is_finite(local) for local in tensor.local_tensors()):
            raise ValueError(f"tensor {name} holds NaN or infinity; it was not sent")


def is_freed(tensor: torch.Tensor) -> bool:
    """Whether the memory that ``tensor`` describes is no longer there, as FSDP leaves what it has resharded."""
    return tensor.untyped_storage().nbytes() < bytes_needed(tensor)


def bytes_needed(tensor: torch.Tensor) -> int:
    """How long its storage must be, from the first byte on; 0 for an empty tensor."""
    if not tensor.numel():
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + reach + 1) * tensor.element_size()


def are_sound(tensors: Sequence[torch.Tensor], needed: Sequence[int], device: torch.device) -> bool:
    """Whether ``check_tensors`` has nothing to say of these tensors, of which each needs so many bytes.

    The same checks, at a tenth of the time; which tensor it is that fails one is left to ``check_tensors``.
    """
    lengths = map(torch.UntypedStorage.nbytes, map(torch.Tensor.untyped_storage, tensors))
    try:
        return set(map(_device, tensors)) <= {_HOST, device} and all(map(ge, lengths, needed))
    except NotImplementedError:  # of torch: a layout other than strided has no storage
        return False


def _problem(tensor: torch.Tensor, device: torch.device) -> str:
    if tensor.is_meta:
        return "is on the meta device: it has a shape but no values; materialise it first"
    if tensor.layout not in _HOLDS_ELEMENTS:
        return f"has the layout {tensor.layout}; make it dense first"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"is on {tensor.device}; move it to a CUDA device or to the host"
    if tensor.is_cuda and tensor.device != device:
        return f"is on {tensor.device}, but this rank sends from {device}; move it there, or set device="
    if is_freed(tensor):
        return "was freed: its storage is smaller than its shape, as after FSDP has resharded it; gather it first"
    return ""


def refuse_forked_cuda() -> None:
    """Raise ``ValueError`` in a process in which CUDA cannot be used any more."""
    if torch.cuda._is_in_bad_fork():
        raise ValueError(
            "this process was forked after CUDA was initialised, so it cannot use the GPU: start trainer ranks with "
            "the spawn method, or fork before the first CUDA call"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Smallest and largest carry NaN and infinity along, without a tensor of booleans.
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(piece))).all()) for piece in _pieces(tensor.detach()))


def _pieces(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    if tensor.element_size() > 1:
        return (tensor,)
    return _widened(tensor)


def _widened(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Numbers of 8 bits have no minimum of their own in torch."""
    for piece in torch.split(tensor.reshape(-1), _ELEMENTS_AT_A_TIME):
        yield piece.to(torch.float32)
