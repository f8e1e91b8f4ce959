"""Every check of a manifest, and its digest."""

import dataclasses

import pytest

from sidecar.errors import InvalidRequest, Reason
from sidecar.manifest import ITEM_SIZES, BucketSpec, Manifest, TensorSpec, check, first_difference
from sidecar.v1 import weight_sync_pb2 as pb

GOOD = TensorSpec("model.norm.weight", "bfloat16", (4, 3), 64, 24)


def manifest_of(*tensors: TensorSpec, size_bytes: int = 256) -> Manifest:
    return Manifest((BucketSpec(size_bytes, tensors),))


def refusal(manifest: Manifest, rank: int = 1) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        check(manifest, rank)
    return raised.value


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_every_dtype_of_the_protocol_passes(dtype: str) -> None:
    check(manifest_of(TensorSpec("w", dtype, (2, 3), 0, 6 * ITEM_SIZES[dtype])), rank=0)


def test_the_domain_knows_exactly_the_protocols_dtypes() -> None:
    named = {name.removeprefix("DATA_TYPE_").lower() for name in pb.DataType.keys()[1:]}
    assert named == set(ITEM_SIZES)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(TensorSpec("scalar", "float32", (), 0, 4), id="scalar"),
        pytest.param(TensorSpec("empty", "float32", (0, 7), 256, 0), id="empty-at-the-very-end"),
        pytest.param(TensorSpec("w", "uint8", (256,), 0, 256), id="fills-its-bucket"),
        pytest.param(TensorSpec("n" * 1024, "uint8", (1,), 3, 1), id="longest-name"),
    ],
)
def test_borderline_tensors_pass(tensor: TensorSpec) -> None:
    check(manifest_of(tensor), rank=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"dtype": "complex64"}, "unknown dtype complex64", id="unknown-dtype"),
        pytest.param({"dtype": "number 99"}, "unknown dtype number 99", id="dtype-from-the-future"),
        pytest.param({"shape": (4, 4)}, "takes 32 bytes, but size_bytes is 24", id="shape-against-bytes"),
        pytest.param({"size_bytes": 26}, "takes 24 bytes, but size_bytes is 26", id="bytes-against-shape"),
        pytest.param({"shape": (-4, -3)}, "shape [-4, -3] has a negative dimension", id="negative-dimensions"),
        pytest.param({"shape": (2**40, 2**40)}, "but size_bytes is 24", id="overflowing-shape"),
        pytest.param({"byte_offset": 65}, "byte_offset 65 is not a multiple of the element size 2", id="misaligned"),
        pytest.param({"byte_offset": 234}, "bytes 234 to 258 reach past the bucket's 256", id="past-the-end"),
        pytest.param({"byte_offset": 2**63}, "reach past the bucket's 256", id="far-past-the-end"),
        pytest.param({"name": ""}, "a name must be 1 to 1024 printable characters", id="no-name"),
        pytest.param({"name": "n" * 1025}, "a name must be 1 to 1024 printable characters", id="long-name"),
        pytest.param({"name": "a\nb"}, "a name must be 1 to 1024 printable characters", id="unprintable-name"),
    ],
)
def test_a_bad_tensor_is_refused_with_rank_bucket_tensor_and_value(changes: dict[str, object], said: str) -> None:
    tensor = dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
    error = refusal(manifest_of(GOOD if tensor.name != GOOD.name else dataclasses.replace(GOOD, name="x"), tensor))
    assert error.reason is Reason.INVALID_TENSOR
    assert error.message.startswith(f"rank 1, bucket 0, tensor {tensor.name[:1024]!r}: ")
    assert said in error.message
    assert error.details == {"rank": "1", "bucket": "0", "tensor": tensor.name[:1024]}


def test_a_name_that_appears_twice_is_refused_even_across_buckets() -> None:
    bucket = BucketSpec(256, (GOOD,))
    error = refusal(Manifest((bucket, bucket)))
    assert error.message.startswith("rank 1, bucket 1, tensor 'model.norm.weight': this name appears twice")


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        pytest.param(Manifest(()), "rank 1: the update has no bucket", id="no-bucket"),
        pytest.param(manifest_of(), "rank 1, bucket 0: holds no tensor", id="bucket-without-tensors"),
    ],
)
def test_an_empty_update_is_refused(manifest: Manifest, said: str) -> None:
    error = refusal(manifest)
    assert error.reason is Reason.EMPTY_UPDATE
    assert error.message.startswith(said)


def test_a_bucket_without_length_is_refused() -> None:
    error = refusal(manifest_of(TensorSpec("e", "uint8", (0,), 0, 0), size_bytes=0))
    assert error.reason is Reason.INVALID_TENSOR
    assert error.message.startswith("rank 1, bucket 0: size_bytes is 0")


def test_the_digest_depends_on_everything_in_the_manifest_and_on_nothing_else() -> None:
    changes = [{"name": "other"}, {"dtype": "float16"}, {"shape": (3, 4)}, {"byte_offset": 0}]
    others = [manifest_of(dataclasses.replace(GOOD, **change)) for change in changes]  # type: ignore[arg-type]
    others += [manifest_of(GOOD, size_bytes=512), Manifest((BucketSpec(256, (GOOD,)),) * 2), Manifest(())]
    digests = {manifest.digest() for manifest in others}
    assert len(digests) == len(others)
    assert manifest_of(GOOD).digest() not in digests
    assert manifest_of(GOOD).digest() == manifest_of(dataclasses.replace(GOOD)).digest()
    assert len(manifest_of(GOOD).digest()) == 64


def test_where_a_tensor_is_cut_into_buckets_changes_the_digest() -> None:
    other = dataclasses.replace(GOOD, name="other", byte_offset=128)
    together = Manifest((BucketSpec(256, (GOOD, other)),))
    apart = Manifest((BucketSpec(256, (GOOD,)), BucketSpec(256, (other,))))
    assert together.digest() != apart.digest()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        pytest.param(
            manifest_of(dataclasses.replace(GOOD, name="b")), "tensor 'model.norm.weight' against 'b'", id="name"
        ),
        pytest.param(
            manifest_of(dataclasses.replace(GOOD, dtype="float16")),
            "tensor 'model.norm.weight': bfloat16 [4, 3] at byte 64 against float16 [4, 3] at byte 64",
            id="dtype",
        ),
        pytest.param(
            manifest_of(GOOD, TensorSpec("more", "uint8", (1,), 0, 1)), "1 tensors against 2", id="more-tensors"
        ),
        pytest.param(manifest_of(GOOD, size_bytes=128), "buckets of [256] bytes against [128]", id="bucket-size"),
    ],
)
def test_the_first_difference_is_put_in_words(second: Manifest, said: str) -> None:
    assert first_difference(manifest_of(GOOD), second) == said
