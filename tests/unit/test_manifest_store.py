"""A manifest is read and checked once, however many ranks send it."""

import asyncio

import pytest

from sidecar.errors import InvalidRequest, NotKnown
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.manifest_store import ManifestStore


def manifest(name: str = "w", byte_offset: int = 0) -> Manifest:
    return Manifest((BucketSpec(64, (TensorSpec(name, "float32", (2,), byte_offset, 8),)),))


class Sent:
    """What ranks send, and how often it was read."""

    def __init__(self, content: Manifest) -> None:
        self.content = content
        self.num_read = 0

    def read(self) -> Manifest:
        self.num_read += 1
        return self.content


def test_ranks_that_send_the_same_bytes_at_once_have_them_read_once() -> None:
    async def story() -> None:
        store, sent = ManifestStore(), Sent(manifest())
        known = await asyncio.gather(*(store.read(b"bytes", sent.read, rank) for rank in range(8)))
        assert sent.num_read == 1
        assert all(one is known[0] for one in known)
        assert store.get(known[0].digest) is known[0]

    asyncio.run(story())


def test_other_bytes_of_an_equal_manifest_are_read_and_found_equal() -> None:
    async def story() -> None:
        store, sent = ManifestStore(), Sent(manifest())
        first = await store.read(b"bytes", sent.read, 0)
        assert await store.read(b"other bytes", sent.read, 1) is first
        assert sent.num_read == 2

    asyncio.run(story())


def test_every_rank_that_sends_a_bad_manifest_is_told_so_by_its_number() -> None:
    async def story() -> None:
        store, sent = ManifestStore(), Sent(manifest(byte_offset=3))
        for rank in range(2):
            with pytest.raises(InvalidRequest, match=f"rank {rank}, bucket 0, tensor 'w': byte_offset 3"):
                await store.read(b"bytes", sent.read, rank)

    asyncio.run(story())


def test_a_manifest_that_was_forgotten_is_read_again() -> None:
    async def story() -> None:
        store, sent = ManifestStore(kept=2), Sent(manifest())
        known = await store.read(b"bytes", sent.read, 0)
        for number in range(3):
            await store.add(manifest(f"w{number}"), 0)
        with pytest.raises(NotKnown):
            store.get(known.digest)
        again = await store.read(b"bytes", sent.read, 0)
        assert (again.digest, sent.num_read) == (known.digest, 2)

    asyncio.run(story())
