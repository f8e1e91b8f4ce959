"""A torch.distributed group of a trainer and engines: what it is, and what may come over it.

Invariant: what ``check`` and ``check_dense`` let pass, SGLang can join and receive: it finds the tensors of a broadcast
bucket by their sizes alone.
"""

from dataclasses import dataclass

from sidecar.errors import InvalidRequest, Reason, UnsuitableEngine
from sidecar.manifest import BucketSpec, Manifest

MAX_TEXT = 128
MAX_HOST = 253
MAX_WORLD = 1 << 16
BACKENDS = ("nccl", "gloo")
NOT_RECEIVED = "Failed to receive weights"
NOT_BEGUN = ("must run between", "are not supported")
"""What every rank says alike; but with a draft model, perhaps only of that, once the target is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How to join one."""

    name: str
    master_address: str
    """Where the trainer's rank 0 serves the TCPStore."""
    master_port: int
    rank_offset: int
    """The engine's TP rank r is the group's rank ``rank_offset + r``."""
    world_size: int
    backend: str

    def check(self, tp_size: int, device: str) -> None:
        """Raise if an engine with that many ranks there cannot be a member: SGLang would wait for what never comes."""
        check_group_name(self.name)
        _check_text(self.master_address, MAX_HOST, "address")
        if not 1 <= self.master_port <= 65535:
            raise _invalid(f"master_port {self.master_port} is no port")
        if not 1 <= self.rank_offset <= self.world_size - tp_size or self.world_size > MAX_WORLD:
            problem = (
                f"the engine's {tp_size} ranks from {self.rank_offset} on do not fit behind rank 0 into a group of "
            )
            raise _invalid(f"{problem}{self.world_size}")
        if self.backend not in BACKENDS:
            raise _invalid(f"backend {self.backend[:MAX_TEXT]!r} is none of {', '.join(BACKENDS)}")
        if self.backend == "nccl" and device != "cuda":
            message = f"backend nccl needs GPUs, and the engine runs on {device}; use gloo"
            raise UnsuitableEngine(Reason.GROUP_UNSUITABLE, message, backend=self.backend, device=device)


def check_group_name(name: str) -> None:
    """Torch numbers its own groups, and a scheduler hangs in a name that only some of its ranks have."""
    _check_text(name, MAX_TEXT, "group_name")
    if not name[0].isalpha():
        raise _invalid(f"group_name {name!r} must begin with a letter")


def check_dense(manifest: Manifest) -> None:
    """A broadcast bucket is its tensors one after the other: SGLang finds them by their sizes alone."""
    for number, bucket in enumerate(manifest.buckets):
        end = 0
        for tensor in bucket.tensors:
            if tensor.byte_offset != end:
                message = (
                    f"bucket {number}, tensor {tensor.name!r}: over a group tensors lie densely, so it must begin at "
                )
                message += f"byte {end}, not {tensor.byte_offset}; order them by element size, the largest first"
                raise InvalidRequest(Reason.INVALID_TENSOR, message, bucket=number, tensor=tensor.name)
            end = tensor.end
        if end != bucket.size_bytes:
            message = (
                f"bucket {number}: its tensors take {end} bytes, and over a group its size_bytes must be as much, "
            )
            raise InvalidRequest(Reason.INVALID_TENSOR, f"{message}not {bucket.size_bytes}", bucket=number)


def tensors_of(bucket: BucketSpec) -> dict[str, object]:
    """What SGLang must know of a bucket that it receives: names, dtypes and shapes, in order."""
    return {
        "names": [tensor.name for tensor in bucket.tensors],
        "dtypes": [tensor.dtype for tensor in bucket.tensors],
        "shapes": [list(tensor.shape) for tensor in bucket.tensors],
    }


def wrote_nothing(refused: str, num_ranks: int, *, one_model: bool) -> bool:
    """Whether a receive that SGLang ``refused`` in these words has left the weights of ``num_ranks`` ranks alone.

    Only the first rank answers. What it has not received, another may have, and has loaded it then. Releases up to
    0.5.20 say of both, a receive and a load that broke, that the weights are partially updated.
    """
    if NOT_RECEIVED in refused:
        return num_ranks == 1
    return one_model and any(words in refused for words in NOT_BEGUN)


def _check_text(text: str, most: int, what: str) -> None:
    if not 1 <= len(text) <= most or not text.isprintable():
        raise _invalid(f"{what} must be 1 to {most} printable characters, not {text[:MAX_TEXT]!r}")


def _invalid(problem: str) -> InvalidRequest:
    return InvalidRequest(Reason.INVALID_GROUP, f"{problem}; see WeightsUpdateGroup in the protocol")
