"""What the peers take of SGLang itself: its serialiser and the classes that its payloads name.

Imported by a trainer's process that runs a peer, before anything is measured: it takes 5 to 20 seconds. Where a class
lies depends on the release, and a pickle names that place.
"""

from typing import Any

import torch


def prepare(device: str) -> None:
    """Make this process's tensors something that another process can open, as the peers' users do."""
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    local_serialized_tensor()
    if device == "cpu":
        # File descriptors cannot go by HTTP.
        torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    else:
        monkey_patch_torch_reductions()  # SGLang's own, called by slime and verl: a GPU goes by its UUID


def serialize(content: object) -> bytes:
    """A pickle with handles in the place of memory; each tensor in it is lent to one importer."""
    from sglang.srt.utils import MultiprocessingSerializer

    pickled: bytes = MultiprocessingSerializer.serialize(content)
    return pickled


def serialize_text(content: object) -> str:
    """The same in base64."""
    from sglang.srt.utils import MultiprocessingSerializer

    text: str = MultiprocessingSerializer.serialize(content, output_str=True)
    return text


def flattened_bucket(tensors: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """One tensor with all their bytes, and where each lies in it."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=tensors)
    return {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}


def local_serialized_tensor() -> Any:
    """The class: one tensor's pickles, by TP rank."""
    try:
        from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor
    except ImportError:  # up to 0.5.15
        from sglang.srt.model_executor.model_runner import LocalSerializedTensor
    return LocalSerializedTensor
