"""What a soak holds against its server, its processes and itself."""

import itertools
import random
from collections import Counter

from tests.soak import draw
from tests.soak.answers import Answer, Failure, ServedVersions, complaints
from tests.soak.content import NAMES, rank_checksums, whole
from tests.soak.faults import KINDS, WEIGHTS, act_of
from tests.soak.samples import MIN_JUDGED, WARM_UP, verdicts

OLD, NEW = (1, 2, 3), (4, 5, 6)


def served() -> ServedVersions:
    """Version 1 from 10, version 2 from 20; the first was served until 21."""
    versions = ServedVersions()
    versions.published("1", "old", since=10.0, superseded=11.0)
    versions.published("2", "new", since=20.0, superseded=21.0)
    return versions


def probe(started: float, finished: float, *versions: str, tokens: tuple[int, ...] = OLD) -> Answer:
    return Answer(started, finished, versions, tokens, is_probe=True)


def test_answers_of_the_version_that_was_served_are_as_they_must_be() -> None:
    answers = [probe(12.0, 13.0, "1"), probe(14.0, 15.0, "1"), probe(22.0, 23.0, "2", tokens=NEW)]
    assert complaints(answers, [], served()) == []


def test_an_answer_may_cross_an_update() -> None:
    assert complaints([probe(19.0, 22.0, "1", "2", tokens=(1, 5, 6))], [], served()) == []


def test_a_version_that_was_never_served_is_noticed() -> None:
    (complaint,) = complaints([probe(12.0, 13.0, "3")], [], served())
    assert "version 3" in complaint


def test_a_version_that_was_no_longer_served_is_noticed() -> None:
    assert complaints([probe(25.0, 26.0, "1")], [], served())


def test_other_tokens_from_the_same_content_are_noticed() -> None:
    assert complaints([probe(12.0, 13.0, "1"), probe(14.0, 15.0, "1", tokens=NEW)], [], served())


def test_the_same_content_under_another_version_must_give_the_same_tokens() -> None:
    versions = served()
    versions.published("3", "old", since=30.0, superseded=31.0)
    assert complaints([probe(12.0, 13.0, "1"), probe(32.0, 33.0, "3")], [], versions) == []
    assert complaints([probe(12.0, 13.0, "1"), probe(32.0, 33.0, "3", tokens=NEW)], [], versions)


def test_only_the_death_of_the_server_excuses_a_failed_request() -> None:
    versions = served()
    versions.outages.append((14.0, 15.0))
    assert complaints([], [Failure(13.0, 14.5, "cut")], versions) == []
    assert complaints([], [Failure(16.0, 17.0, "cut")], versions)


def judged(*lives: list[float]) -> list[bool]:
    """Whether each life that is judged is flat, and last whether all of them are together."""
    taken = [{"role": "rank_0", "pid": pid, "fds": value} for pid, life in enumerate(lives) for value in life]
    return [verdict.flat for verdict in verdicts(taken, {"rank": {"fds": 2}})]


LONG = WARM_UP + MIN_JUDGED


def test_a_number_that_stays_is_flat() -> None:
    assert judged([10.0, 11.0] * LONG) == [True, True]


def test_a_warm_up_is_not_growth() -> None:
    assert judged([7.0] * WARM_UP + [10.0, 11.0] * MIN_JUDGED) == [True, True]


def test_a_number_that_creeps_up_is_not_flat() -> None:
    assert judged([10.0] * WARM_UP + [10.0 + 0.3 * index for index in range(12)]) == [False, True]


def test_a_short_life_is_judged_with_the_others_only() -> None:
    assert judged([1.0] * (LONG - 1)) == [True]


def test_what_adds_up_over_lives_is_not_flat() -> None:
    assert judged([10.0] * LONG, [12.0] * LONG, [15.0] * LONG) == [True, True, True, False]


def test_every_kind_of_fault_comes_once_in_a_while() -> None:
    drawn = Counter(itertools.islice(draw.faults(random.Random(3), WEIGHTS), sum(WEIGHTS.values())))
    assert drawn == WEIGHTS


def test_updates_are_of_every_size() -> None:
    rng = random.Random(4)
    steps = [draw.step(rng, number, whole=False, fault=None, bucketed=False) for number in range(300)]
    assert {step.buckets for step in steps} == set(range(1, draw.MAX_BUCKETS + 1))
    assert min(step.num_bytes for step in steps) < 50_000 < 1_000_000 < max(step.num_bytes for step in steps)
    assert any(step.whole for step in steps)
    assert any(not step.whole for step in steps)


def test_a_fault_between_buckets_has_buckets_to_come_between() -> None:
    rng = random.Random(5)
    for kind in KINDS:
        fault = draw.fault(rng, kind)
        step = draw.step(rng, 1, whole=False, fault=fault, bucketed=KINDS[kind].bucketed)
        assert step.buckets > 1 or not KINDS[kind].bucketed
        assert act_of(fault, 1 - fault.rank, len(step.names)) == {"act": "", "at": -1}


def test_ranks_hold_halves_of_what_is_cut_and_the_same_of_what_is_not() -> None:
    first, second = rank_checksums(whole(1), 2)
    assert first.keys() == second.keys()
    same = {name for name in first if first[name] == second[name]}
    assert same == {name for name in NAMES if "norm" in name}
