"""What the server serves after an update is what the trainer sent, on every release and TP size."""

from collections.abc import Iterator

import pytest

from adapter.demo.trainers import TrainerRank
from tests.e2e.engines import SMALL_BUCKET_BYTES, Stack, on_every_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="session")
def with_small_buckets(stack: Stack) -> Iterator[list[TrainerRank]]:
    """Another trainer of the same server."""
    with stack.more_ranks(SMALL_BUCKET_BYTES) as ranks:
        yield ranks


@on_every_engine
def test_tokens_follow_the_weights(stack: Stack) -> None:
    tokens = []
    for seed in (1, 2, 1):
        stack.update(seed)
        tokens.append(stack.tokens())
    first, second, again = tokens
    assert first != second
    assert again == first


@on_every_engine
def test_checksums_equal_those_of_the_same_weights_loaded_from_disk(stack: Stack) -> None:
    sent = {}
    for seed in (1, 2):
        stack.update(seed)
        sent[seed] = stack.http.rank_checksums()
    assert len(sent[1]) == stack.spec.tp_size
    assert all(one != two for one, two in zip(sent[1], sent[2], strict=True))
    for seed in (1, 2):  # the server holds 2 now, so each load is a change
        stack.load_from_disk(seed)
        assert stack.http.rank_checksums() == sent[seed]


@on_every_engine
def test_buckets_bring_the_same_weights_as_one_call(stack: Stack, with_small_buckets: list[TrainerRank]) -> None:
    stack.update(3)
    in_one_call = stack.http.rank_checksums()
    stack.update(4)
    stack.update(3, with_small_buckets)
    assert stack.http.rank_checksums() == in_one_call


@on_every_engine
def test_an_update_that_fits_one_bucket_is_one_post(stack: Stack) -> None:
    before = stack.num_posts()
    reports = stack.update(1)
    assert stack.num_posts() - before == 1
    assert [report.num_posts for report in reports] == [1] * stack.spec.tp_size


@on_every_engine
def test_an_update_in_buckets_is_one_post_per_bucket(stack: Stack, with_small_buckets: list[TrainerRank]) -> None:
    before = stack.num_posts()
    reports = stack.update(1, with_small_buckets)
    posts = stack.num_posts() - before
    assert posts > 3
    assert [report.num_posts for report in reports] == [posts] * stack.spec.tp_size


@on_every_engine
def test_the_server_names_the_version_and_the_cache_is_flushed(stack: Stack) -> None:
    reports = stack.update(1)
    assert all(report.cache_flushed for report in reports)
    assert stack.http.weight_version() == reports[0].weight_version
    assert set(reports[0].phases) >= {"collect", "load", "publish"}
