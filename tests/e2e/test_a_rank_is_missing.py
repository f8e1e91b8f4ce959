"""A rank that never comes costs the others their deadline, and the server nothing."""

import time

import pytest

from tests.e2e.engines import Stack, on_tp2

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DEADLINE_S = 4.0


@on_tp2
def test_the_other_ranks_call_ends_at_its_deadline_and_names_the_missing_rank(stack: Stack) -> None:
    stack.ranks[0].start_update(seed=7, version=stack.new_version(), timeout_s=DEADLINE_S)
    report = stack.ranks[0].finish_update()
    assert report.kind == "RanksMissing"
    assert "rank 1" in report.error
    assert DEADLINE_S - 0.5 < report.seconds < DEADLINE_S + 3


@on_tp2
def test_generation_goes_on_with_the_old_weights(stack: Stack) -> None:
    stack.update(1)
    old_tokens, posts, version = stack.tokens(), stack.num_posts(), stack.http.weight_version()
    stack.ranks[0].start_update(seed=7, version=stack.new_version(), timeout_s=DEADLINE_S)
    time.sleep(1.0)
    assert stack.tokens() == old_tokens, "while the rank is waited for"
    assert stack.ranks[0].finish_update().error
    assert stack.tokens() == old_tokens, "after the deadline"
    assert (stack.num_posts(), stack.http.weight_version()) == (posts, version)


@on_tp2
def test_the_next_update_goes_through(stack: Stack) -> None:
    stack.update(1)
    old_tokens = stack.tokens()
    stack.ranks[1].start_update(seed=7, version=stack.new_version(), timeout_s=1.0)
    assert "rank 0" in stack.ranks[1].finish_update().error
    stack.update(2)
    assert stack.tokens() != old_tokens
