"""What the replay loader writes is what the model's own load writes: checksums and tokens, on every release."""

import pytest

from tests.e2e.engines import SMALL_BUCKET_BYTES, Stack, on_every_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@on_every_engine
def test_the_first_update_is_recorded_the_second_proven_and_the_others_replayed(stack: Stack) -> None:
    with stack.more_ranks(2 * SMALL_BUCKET_BYTES) as ranks:  # a manifest that no other test sends
        paths = [stack.update(seed, ranks)[0].load_path for seed in (1, 2, 3, 4)]
    assert paths == ["recorded", "proven", "replayed", "replayed"]


@on_every_engine
def test_a_replay_gives_the_checksums_and_tokens_of_a_load_from_disk(stack: Stack) -> None:
    for seed in (1, 2):
        stack.update(seed)
    reports = stack.update(5)
    assert [report.load_path for report in reports] == ["replayed"] * stack.spec.tp_size
    replayed = stack.http.rank_checksums(), stack.tokens()
    stack.update(6)
    assert stack.http.rank_checksums() != replayed[0]
    stack.load_from_disk(5)
    assert (stack.http.rank_checksums(), stack.tokens()) == replayed
