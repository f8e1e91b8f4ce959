"""What an update contains, and every check of it.

Owns the domain's picture of tensors and buckets. Invariant: a ``Manifest`` that ``check`` let pass describes bytes
that SGLang can view as the tensors named (``flat[start:end].view(dtype).reshape(shape)``): a wrong one would kill
its scheduler.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from sidecar.errors import InvalidRequest, Reason

MAX_NAME_LENGTH = 1024
MAX_SIZES_SHOWN = 256
MAX_DIMENSIONS = 64
"""More than any operation of torch's takes; and a product of more is work in itself."""

# Bytes per element, by torch's name. All are in the unpickling allow-list of SGLang 0.5.21 and later
# (srt/utils/common.py) and under the allowed prefix "torch." before that.
ITEM_SIZES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's place inside its bucket."""

    name: str
    """Hugging Face name."""
    dtype: str
    """torch's name of the element type, such as "bfloat16"."""
    shape: tuple[int, ...]
    """Of the whole tensor; () for a scalar."""
    byte_offset: int
    """From the start of the bucket."""
    size_bytes: int

    @property
    def end(self) -> int:
        """First byte after the tensor, from the start of the bucket."""
        return self.byte_offset + self.size_bytes

    def describe(self) -> str:
        """One line for messages."""
        return f"{self.dtype} {list(self.shape)} at byte {self.byte_offset}"


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """One region of memory and the tensors in it."""

    size_bytes: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The ordered buckets of an update, equal on all ranks."""

    buckets: tuple[BucketSpec, ...]

    def tensors(self) -> Iterator[TensorSpec]:
        """All tensors, in load order."""
        for bucket in self.buckets:
            yield from bucket.tensors

    def digest(self) -> str:
        """SHA-256 in hexadecimal over one line per bucket and per tensor."""
        lines = hashlib.sha256()
        for bucket in self.buckets:
            lines.update(f"bucket {bucket.size_bytes}\n".encode())
            for tensor in bucket.tensors:
                shape = ",".join(map(str, tensor.shape))
                lines.update(f"{tensor.name}\t{tensor.dtype}\t{shape}\t{tensor.byte_offset}\n".encode())
        return lines.hexdigest()


def check(manifest: Manifest, rank: int) -> None:
    """Raise ``InvalidRequest`` naming rank, bucket, tensor and value if SGLang could not take this manifest."""
    if not manifest.buckets:
        raise InvalidRequest(
            Reason.EMPTY_UPDATE, f"rank {rank}: the update has no bucket; send at least one", rank=rank
        )
    seen: set[str] = set()
    for index, bucket in enumerate(manifest.buckets):
        _check_bucket(bucket, index, rank)
        for tensor in bucket.tensors:
            _check_tensor(tensor, bucket, index, rank)
            if tensor.name in seen:
                raise _invalid(rank, index, tensor, "this name appears twice in the manifest; send each tensor once")
            seen.add(tensor.name)


def first_difference(first: Manifest, second: Manifest) -> str:
    """Say in words where two manifests part: the first tensor, or the bucket cut, that is not the same."""
    for one, other in zip(first.tensors(), second.tensors(), strict=False):
        if one.name != other.name:
            return f"tensor {one.name!r} against {other.name!r}"
        if one != other:
            return f"tensor {one.name!r}: {one.describe()} against {other.describe()}"
    counts = [sum(1 for _ in manifest.tensors()) for manifest in (first, second)]
    if counts[0] != counts[1]:
        return f"{counts[0]} tensors against {counts[1]}"
    sizes = [[bucket.size_bytes for bucket in manifest.buckets] for manifest in (first, second)]
    return f"buckets of {str(sizes[0])[:MAX_SIZES_SHOWN]} bytes against {str(sizes[1])[:MAX_SIZES_SHOWN]}"


def _check_bucket(bucket: BucketSpec, index: int, rank: int) -> None:
    if not bucket.tensors:
        raise InvalidRequest(
            Reason.EMPTY_UPDATE, f"rank {rank}, bucket {index}: holds no tensor; leave it out", rank=rank, bucket=index
        )
    if bucket.size_bytes <= 0:
        raise InvalidRequest(
            Reason.INVALID_TENSOR,
            f"rank {rank}, bucket {index}: size_bytes is 0; give its length",
            rank=rank,
            bucket=index,
        )


def _check_tensor(tensor: TensorSpec, bucket: BucketSpec, index: int, rank: int) -> None:
    if not tensor.name or len(tensor.name) > MAX_NAME_LENGTH or not tensor.name.isprintable():
        problem = f"a name must be 1 to {MAX_NAME_LENGTH} printable characters"
        raise _invalid(rank, index, tensor, problem)
    item_size = ITEM_SIZES.get(tensor.dtype)
    if item_size is None:
        known = ", ".join(ITEM_SIZES)
        raise _invalid(rank, index, tensor, f"unknown dtype {tensor.dtype}; this sidecar knows {known}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        problem = f"its shape has {len(tensor.shape)} dimensions; at most {MAX_DIMENSIONS} are possible"
        raise _invalid(rank, index, tensor, problem)
    if any(size < 0 for size in tensor.shape):
        raise _invalid(rank, index, tensor, f"shape {list(tensor.shape)} has a negative dimension")
    expected = prod(tensor.shape) * item_size
    if tensor.size_bytes != expected:
        shape = f"shape {list(tensor.shape)} of {tensor.dtype}"
        raise _invalid(rank, index, tensor, f"{shape} takes {expected} bytes, but size_bytes is {tensor.size_bytes}")
    if prod(filter(None, tensor.shape)) >= 1 << 63:  # torch multiplies before it meets a 0, and raises
        raise _invalid(rank, index, tensor, f"shape {list(tensor.shape)} is more than torch can count")
    if tensor.byte_offset % item_size:
        problem = f"byte_offset {tensor.byte_offset} is not a multiple of the element size {item_size}"
        raise _invalid(rank, index, tensor, problem)
    if tensor.end > bucket.size_bytes:
        problem = f"bytes {tensor.byte_offset} to {tensor.end} reach past the bucket's {bucket.size_bytes}"
        raise _invalid(rank, index, tensor, problem)


def _invalid(rank: int, bucket: int, tensor: TensorSpec, problem: str) -> InvalidRequest:
    name = tensor.name[:MAX_NAME_LENGTH]
    message = f"rank {rank}, bucket {bucket}, tensor {name!r}: {problem}"
    return InvalidRequest(Reason.INVALID_TENSOR, message, rank=rank, bucket=bucket, tensor=name)
