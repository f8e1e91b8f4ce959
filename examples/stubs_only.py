"""A trainer with nothing but the generated stubs and torch: what a client in any language has to do.

    python examples/stubs_only.py --target unix:/path.sock --tp-size 2 --version 1 --checkpoint weights.pt

Sends the tensors of a file that torch.save wrote (name -> tensor) from every TP rank, through host memory, to an
engine on the CPU. Ranks are threads here for brevity; in a trainer each is a process of its own, and none of them
talks to another.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch

from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc

Tensors = dict[str, torch.Tensor]
ALIGNMENT = 64


def describe(tensors: Tensors) -> pb.Manifest:
    """One bucket that holds everything: names, element types, shapes and where each tensor begins."""
    bucket = pb.BucketSpec()
    for name, tensor in tensors.items():
        bucket.tensors.add(
            name=name,
            dtype=pb.DataType.Value("DATA_TYPE_" + str(tensor.dtype).removeprefix("torch.").upper()),
            shape=tensor.shape,
            byte_offset=bucket.size_bytes,
            size_bytes=tensor.nbytes,
        )
        bucket.size_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return pb.Manifest(buckets=[bucket])


def share(tensors: Tensors, bucket: pb.BucketSpec) -> tuple[torch.UntypedStorage, pb.MemoryHandle]:
    """Copy the tensors into shared memory as described, and say where that is."""
    storage = torch.UntypedStorage._new_using_filename_cpu(bucket.size_bytes)
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    for spec in bucket.tensors:
        source = tensors[spec.name].contiguous().view(-1).view(torch.uint8)
        flat[spec.byte_offset : spec.byte_offset + spec.size_bytes].copy_(source)
    manager, name, size = storage._share_filename_cpu_()
    storage._shared_incref()  # type: ignore[no-untyped-call]  # the engine lowers the count when it opens the file
    handle = pb.SharedMemoryHandle(manager_path=manager.decode(), name=name.decode(), size_bytes=size)
    return storage, pb.MemoryHandle(shared_memory=handle)


def send(target: str, rank: int, tp_size: int, version: str, tensors: Tensors) -> pb.UpdateOutcome:
    """What one rank does: returns when the engine serves the new version."""
    manifest = describe(tensors)
    storage, handle = share(tensors, manifest.buckets[0])
    request = pb.UpdateWeightsRequest(
        update=pb.UpdateHeader(update_id=version, weight_version=version, rank=rank, tp_size=tp_size),
        manifest=pb.ManifestReference(manifest=manifest),
        handles=[handle],
    )
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        outcome = pb_grpc.WeightSyncServiceStub(channel).UpdateWeights(request, timeout=120).outcome
    del storage  # not before the answer: the engine reads it
    return outcome


def main() -> None:
    """Parse the command line and send from all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--tp-size", type=int, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--checkpoint", required=True, help="a file written by torch.save: name -> tensor")
    options = parser.parse_args()
    tensors: Tensors = torch.load(options.checkpoint, weights_only=True)
    with ThreadPoolExecutor(options.tp_size) as ranks:
        calls = [
            ranks.submit(send, options.target, rank, options.tp_size, options.version, tensors)
            for rank in range(options.tp_size)
        ]
    for rank, call in enumerate(calls):
        outcome = call.result()
        print(f"rank {rank}: {pb.UpdateState.Name(outcome.state)}, the engine serves {outcome.weight_version!r}")


if __name__ == "__main__":
    main()
