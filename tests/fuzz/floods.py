"""Requests with far too much of one thing, of a megabyte or so each."""

import random
from collections.abc import Callable

from google.protobuf.message import Message

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fuzz.valid import Valid

MANY = 20_000
LONG = 1 << 20

Flooded = tuple[str, Message]


def flooded(rng: random.Random, valid: Valid) -> Flooded:
    """One of them: the RPC and its request."""
    kinds: tuple[Callable[[Valid], Flooded], ...] = (
        _dimensions,
        _patterns,
        _names,
        _tensors,
        _buckets,
        _handles,
        _reason,
        _long_id,
        _config,
        _nested_config,
    )
    return rng.choice(kinds)(valid)


def _update(valid: Valid) -> pb.UpdateWeightsRequest:
    return valid.one_call(valid.new_id(), valid.manifest(1), {})(0)


def _dimensions(valid: Valid) -> Flooded:
    request = pb.CheckManifestRequest(manifest=pb.ManifestReference(manifest=valid.manifest(1)))
    request.manifest.manifest.buckets[0].tensors[0].shape[:] = [2**62] * MANY
    return "CheckManifest", request


def _patterns(valid: Valid) -> Flooded:
    request = _update(valid)
    request.update.allow.unknown.extend(f"*{number}*a*b*c*d[" for number in range(MANY))
    return "UpdateWeights", request


def _names(valid: Valid) -> Flooded:
    allow = pb.ManifestAllowance(unknown=[f"name {number}" for number in range(MANY)])
    return "CheckManifest", pb.CheckManifestRequest(
        manifest=pb.ManifestReference(manifest=valid.manifest(1)), allow=allow
    )


def _tensors(valid: Valid) -> Flooded:
    request = _update(valid)
    bucket = pb.Manifest(buckets=[pb.BucketSpec(size_bytes=64)]).buckets[0]
    for number in range(MANY):
        bucket.tensors.add(name=f"tensor {number}", dtype=pb.DATA_TYPE_INT8, shape=[1], size_bytes=1)
    bucket.tensors.add(name="the last", dtype=pb.DATA_TYPE_INT8, shape=[1], byte_offset=64, size_bytes=1)
    request.manifest.manifest.buckets.insert(0, bucket)
    return "UpdateWeights", request


def _buckets(valid: Valid) -> Flooded:
    request = _update(valid)
    request.manifest.manifest.buckets.extend(list(request.manifest.manifest.buckets[:1]) * (MANY // 10))
    return "UpdateWeights", request


def _handles(valid: Valid) -> Flooded:
    request = _update(valid)
    request.handles.extend([valid.handle(0, 0)] * (MANY // 10))
    return "UpdateWeights", request


def _reason(valid: Valid) -> Flooded:
    return "AbortUpdate", pb.AbortUpdateRequest(update_id=valid.new_id(), rank=0, reason="because \n" * (LONG // 9))


def _long_id(_: Valid) -> Flooded:
    return "GetUpdate", pb.GetUpdateRequest(update_id="漢" * (LONG // 3))


def _config(valid: Valid) -> Flooded:
    request = valid.adapter(valid.new_id(), "adapter 0")(0)
    request.config_json = '{"peft_type": "LORA", "r": "' + "x" * LONG + '"}'
    return "LoadLoraAdapter", request


def _nested_config(valid: Valid) -> Flooded:
    request = valid.adapter(valid.new_id(), "adapter 0")(0)
    request.config_json = '{"peft_type": ' + "[" * 30_000 + "]" * 30_000 + "}"
    return "LoadLoraAdapter", request
