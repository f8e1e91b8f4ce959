"""What checksums prove: over the ranks of one update, and over the updates of one content."""

from collections.abc import Sequence

import pytest

from sidecar.errors import ChecksumsDiffer, Reason
from sidecar.header import Header, Selector
from sidecar.manifest import Manifest
from sidecar.update import Update, Verification
from sidecar.verification import Checksums, Verifier


def update(content: str = "", *, tp_size: int = 2, selector: Selector | None = None, digest: str = "sent") -> Update:
    header = Header(
        update_id="u",
        weight_version="7",
        rank=0,
        tp_size=tp_size,
        selector=selector,
        verify=True,
        content_digest=content,
    )
    return Update(header, Manifest(()), digest)


def ranks(*of_rank: dict[str, str]) -> Sequence[dict[str, str]]:
    return of_rank


def difference(verifier: Verifier, one: Update, checksums: Checksums) -> ChecksumsDiffer:
    with pytest.raises(ChecksumsDiffer) as raised:
        verifier.check(one, checksums)
    assert raised.value.reason is Reason.CHECKSUMS_DIFFER
    assert raised.value.message.startswith("update 'u': ")
    return raised.value


def learned(verifier: Verifier) -> None:
    """Two contents under which "norm" is equal on both ranks, and "proj" is not."""
    verifier.check(update("a"), ranks({"norm": "n1", "proj": "p1"}, {"norm": "n1", "proj": "p2"}))
    verifier.check(update("b"), ranks({"norm": "n2", "proj": "p3"}, {"norm": "n2", "proj": "p4"}))


def test_the_first_of_a_content_is_consistent_and_the_same_again_is_proven() -> None:
    verifier = Verifier()
    checksums = ranks({"w": "1", "v": "2"}, {"w": "3", "v": "4"})
    assert verifier.check(update("a"), checksums) is Verification.CONSISTENT
    assert verifier.check(update("b"), ranks({"w": "5", "v": "6"}, {"w": "7", "v": "8"})) is Verification.CONSISTENT
    assert verifier.check(update("a"), checksums) is Verification.PROVEN


def test_a_content_without_a_name_has_nothing_to_be_compared_with() -> None:
    verifier = Verifier()
    assert verifier.check(update(), ranks({"w": "1"}, {"w": "2"})) is Verification.CONSISTENT
    assert verifier.check(update(), ranks({"w": "3"}, {"w": "4"})) is Verification.CONSISTENT


def test_one_content_that_gives_other_checksums_names_rank_and_tensors() -> None:
    verifier = Verifier()
    verifier.check(update("a"), ranks({"w": "1", "v": "2"}, {"w": "3", "v": "4"}))
    error = difference(verifier, update("a"), ranks({"w": "1", "v": "2"}, {"w": "3", "v": "5"}))
    assert error.message == "update 'u': rank 1 differs from what this content gave before: v"
    assert error.details == {"updateId": "u", "tensors": "1"}


def test_a_tensor_that_came_or_went_is_a_difference() -> None:
    verifier = Verifier()
    verifier.check(update("a"), ranks({"w": "1"}, {"w": "3"}))
    error = difference(verifier, update("a"), ranks({"w": "1", "new": "2"}, {"w": "3", "new": "4"}))
    assert "rank 0 differs from what this content gave before: new" in error.message


def test_ranks_that_hold_other_tensors_differ() -> None:
    error = difference(Verifier(), update("a"), ranks({"w": "1", "v": "2"}, {"w": "1", "u": "2"}))
    assert error.message == "update 'u': ranks 0 and 1 do not hold the same tensors: u, v"


@pytest.mark.parametrize("answered", [0, 1, 3])
def test_every_rank_must_have_answered(answered: int) -> None:
    error = difference(Verifier(), update("a"), [{"w": "1"}] * answered)
    assert error.message == f"update 'u': {answered} ranks of 2 answered"


def test_no_more_than_five_tensors_are_named_and_all_are_counted() -> None:
    names = [f"w{number}" for number in range(8)]
    error = difference(Verifier(), update(), ranks(dict.fromkeys(names, "1"), {}))
    assert error.message.endswith("the same tensors: w0, w1, w2, w3, w4 and 3 more")
    assert error.details["tensors"] == "8"


def test_a_tensor_that_ranks_held_alike_under_two_contents_is_whole_and_must_stay_alike() -> None:
    verifier = Verifier()
    learned(verifier)
    error = difference(verifier, update("c"), ranks({"norm": "n3", "proj": "p"}, {"norm": "n4", "proj": "p"}))
    assert error.message == "update 'u': ranks differ in tensors that each of them holds whole: norm"


def test_a_tensor_that_was_alike_under_one_content_alone_may_be_a_shard_of_zeros() -> None:
    verifier = Verifier()
    for content in ("a", "b"):
        verifier.check(update(content), ranks({"bias": "zeros"}, {"bias": "zeros"}))
    assert verifier.check(update("c"), ranks({"bias": "1"}, {"bias": "2"})) is Verification.CONSISTENT


def test_a_tensor_that_was_ever_unlike_is_a_shard_for_good() -> None:
    verifier = Verifier()
    verifier.check(update("a"), ranks({"bias": "1"}, {"bias": "2"}))
    for content in ("b", "c"):
        verifier.check(update(content), ranks({"bias": content}, {"bias": content}))
    assert verifier.check(update("d"), ranks({"bias": "3"}, {"bias": "4"})) is Verification.CONSISTENT


def test_nothing_is_learned_from_what_differed() -> None:
    verifier = Verifier()
    learned(verifier)
    wrong = ranks({"norm": "n3", "proj": "p"}, {"norm": "n4", "proj": "p"})
    difference(verifier, update("c"), wrong)
    difference(verifier, update("c"), wrong)
    right = ranks({"norm": "n3", "proj": "p"}, {"norm": "n3", "proj": "q"})
    assert verifier.check(update("c"), right) is Verification.CONSISTENT
    assert verifier.check(update("c"), right) is Verification.PROVEN


def test_a_content_keeps_its_checksums_after_it_was_loaded_wrong() -> None:
    verifier = Verifier()
    right = ranks({"w": "1"}, {"w": "2"})
    verifier.check(update("a"), right)
    difference(verifier, update("a"), ranks({"w": "1"}, {"w": "3"}))
    assert verifier.check(update("a"), right) is Verification.PROVEN


def test_one_rank_alone_teaches_nothing_about_shards() -> None:
    verifier = Verifier()
    for content in ("a", "b"):
        verifier.check(update(content, tp_size=1), ranks({"w": content}))
    assert verifier.check(update("c"), ranks({"w": "1"}, {"w": "2"})) is Verification.CONSISTENT


def test_an_update_of_another_model_or_from_other_ranks_is_another_content() -> None:
    verifier = Verifier()
    verifier.check(update("a"), ranks({"w": "1"}, {"w": "2"}))
    draft = update("a", selector=Selector.DRAFT)
    assert verifier.check(draft, ranks({"w": "3"}, {"w": "4"})) is Verification.CONSISTENT
    assert verifier.check(update("a", tp_size=1), ranks({"w": "5"})) is Verification.CONSISTENT
    assert verifier.check(draft, ranks({"w": "3"}, {"w": "4"})) is Verification.PROVEN


def test_the_contents_that_were_verified_last_are_kept() -> None:
    verifier = Verifier(kept=2)
    checksums = ranks({"w": "1"}, {"w": "2"})
    for content in ("a", "b", "a", "c"):  # "a" again makes "b" the oldest
        verifier.check(update(content), checksums)
    assert verifier.check(update("a"), checksums) is Verification.PROVEN
    assert verifier.check(update("b"), checksums) is Verification.CONSISTENT
