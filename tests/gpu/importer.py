"""Another process that opens CUDA memory as an engine does.

    python -m tests.gpu.importer

Reads one CudaIpcHandle per line, in hexadecimal; opens it, answers with the sum of its bytes, and has let go by then.
"""

import sys

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from sidecar.v1 import weight_sync_pb2 as pb


def sum_of(handle: pb.CudaIpcHandle) -> int:
    """The sum of all bytes of the region; nothing of it is held afterwards."""
    size = handle.storage_size_bytes
    tensor: torch.Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        torch.Tensor,
        (size,),
        (1,),
        0,
        torch.storage.TypedStorage,
        torch.uint8,
        torch.cuda.current_device(),
        handle.memory_handle,
        size,
        handle.storage_offset_bytes,
        False,
        handle.ref_counter_handle.encode(),
        handle.ref_counter_offset,
        handle.event_handle,
        handle.event_sync_required,
    )
    return int(tensor.sum(dtype=torch.int64))


def main() -> None:
    """Answer until standard input ends."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    for line in sys.stdin:
        print(sum_of(pb.CudaIpcHandle.FromString(bytes.fromhex(line))), flush=True)


if __name__ == "__main__":
    main()
