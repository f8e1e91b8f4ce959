"""The update's state machine, without any of the waiting around it."""

import dataclasses

import pytest

from sidecar.errors import InvalidRequest, RankAlreadyDelivered, Reason, SyncError, UnsuitableEngine, UpdateConflict
from sidecar.header import MAX_RANKS, Header, PauseMode
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.memory import SharedMemory
from sidecar.update import Phase, Transport, Update, UpdateState

HEADER = Header(update_id="u1", weight_version="v1", rank=0, tp_size=2)
TWO_PHASE = dataclasses.replace(HEADER, two_phase=True)
MANIFEST = Manifest(tuple(BucketSpec(64, (TensorSpec(name, "uint8", (64,), 0, 64),)) for name in ("first", "second")))
ERROR = UpdateConflict(Reason.UPDATE_ABORTED, "rank 0 aborted it")


def memory(number: int) -> SharedMemory:
    return SharedMemory("/tmp/manager.sock", f"/torch_{number}", 64)


def new_update() -> Update:
    return Update(header=HEADER, manifest=MANIFEST, digest=MANIFEST.digest())


def delivered(*buckets: int) -> Update:
    update = new_update()
    for rank in range(2):
        update.join(rank)
        for bucket in buckets:
            update.deliver(rank, bucket, memory(10 * rank + bucket))
    return update


def test_an_update_waits_for_every_rank_in_order_until_each_brought_its_first_bucket() -> None:
    update = new_update()
    assert update.missing() == [0, 1]
    update.join(1)
    assert update.missing() == [0, 1]
    update.deliver(1, 0, memory(1))
    assert update.missing() == [0]
    update.join(0)
    update.deliver(0, 0, memory(0))
    assert update.missing() == []
    assert update.memories(0) == [memory(0), memory(1)]


def test_while_it_is_applied_an_update_waits_for_the_next_bucket_and_then_for_commits() -> None:
    update = delivered(0)
    update.start_applying()
    update.num_posted = 1
    assert update.missing() == [0, 1]
    for rank in range(2):
        update.deliver(rank, 1, memory(rank))
    update.num_posted = 2
    assert update.missing() == [0, 1]
    update.deliveries[1].committed = True
    assert update.missing() == [0]
    update.deliveries[0].committed = True
    assert update.complete
    update.end(UpdateState.COMMITTED)
    assert update.missing() == []


def test_the_same_memory_again_changes_nothing_and_other_memory_is_refused() -> None:
    update = delivered(0)
    update.deliver(0, 0, memory(0))
    with pytest.raises(RankAlreadyDelivered) as raised:
        update.deliver(0, 0, memory(77))
    assert raised.value.reason is Reason.RANK_DELIVERED_TWICE
    assert raised.value.message.startswith("rank 0 has already delivered bucket 0 of update 'u1'")
    assert update.memories(0)[0] == memory(0)


def test_joining_again_forgets_nothing() -> None:
    update = delivered(0)
    update.join(0)
    assert update.waiting_for(0) == []


def test_applying_cannot_start_while_a_rank_is_missing() -> None:
    update = new_update()
    update.join(0)
    update.deliver(0, 0, memory(0))
    with pytest.raises(AssertionError):
        update.start_applying()


@pytest.mark.parametrize("state", [state for state in UpdateState if state.ended])
def test_nothing_leaves_an_ended_state(state: UpdateState) -> None:
    update = delivered(0)
    update.end(state, None if state is UpdateState.COMMITTED else ERROR)
    with pytest.raises(AssertionError):
        update.end(UpdateState.ABORTED, ERROR)
    with pytest.raises(AssertionError):
        update.start_applying()


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (UpdateState.COMMITTED, ERROR),
        (UpdateState.ABORTED, None),
        (UpdateState.FAILED, None),
        (UpdateState.APPLYING, ERROR),
    ],
)
def test_an_update_ends_committed_without_an_error_or_otherwise_with_one(
    state: UpdateState, error: SyncError | None
) -> None:
    with pytest.raises(AssertionError):
        delivered(0).end(state, error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight_version": "v2"}, "weight_version 'v1' against 'v2'"),
        ({"pause_mode": PauseMode.ABORT}, "pause_mode <PauseMode.RETRACT: 'retract'> against <PauseMode.ABORT"),
        ({"keep_cache": True}, "keep_cache False against True"),
    ],
)
def test_ranks_that_send_different_headers_are_told_both_values(changes: dict[str, object], said: str) -> None:
    other = dataclasses.replace(HEADER, rank=1, **changes)  # type: ignore[arg-type]
    with pytest.raises(UpdateConflict) as raised:
        new_update().check_same(other, MANIFEST, MANIFEST.digest())
    assert raised.value.reason is Reason.RANKS_DIFFER
    assert raised.value.message.startswith("update 'u1': ranks 0 and 1 differ: ")
    assert said in raised.value.message


def test_ranks_that_send_different_manifests_are_told_the_first_difference() -> None:
    other = Manifest(MANIFEST.buckets[:1])
    with pytest.raises(UpdateConflict, match="ranks 0 and 1 differ: 2 tensors against 1"):
        new_update().check_same(dataclasses.replace(HEADER, rank=1), other, other.digest())


def test_a_header_that_fits_the_engine_passes() -> None:
    dataclasses.replace(HEADER, update_id="u" * 128, weight_version="v" * 128, rank=1).check(2)


@pytest.mark.parametrize("field", ["update_id", "weight_version"])
@pytest.mark.parametrize("value", ["", "x" * 129, "a\nb"], ids=["empty", "long", "unprintable"])
def test_an_id_or_version_that_cannot_be_printed_is_refused(field: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        dataclasses.replace(HEADER, **{field: value}).check(2)  # type: ignore[arg-type]
    assert raised.value.reason is Reason.INVALID_HEADER
    assert raised.value.message.startswith(f"rank 0: {field} must be 1 to 128 printable characters, not ")


def test_a_rank_outside_the_engines_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"rank 2 is outside 0\.\.1; number the ranks") as raised:
        dataclasses.replace(HEADER, rank=2).check(2)
    assert raised.value.reason is Reason.RANK_OUT_OF_RANGE


def test_a_trainer_of_another_size_than_the_engine_is_refused() -> None:
    with pytest.raises(UnsuitableEngine, match="sends from 2 ranks, but the engine has tp_size 4") as raised:
        HEADER.check(4)
    assert raised.value.reason is Reason.TP_SIZE_MISMATCH
    assert raised.value.details == {"rank": "0", "tpSize": "2", "engineTpSize": "4"}


def test_the_phase_it_is_in_is_told_with_the_time_so_far() -> None:
    update = new_update()
    update.started = 10.0
    assert update.spent(10.5) == {Phase.COLLECT: 0.5}
    update.phase_seconds[Phase.COLLECT] = 1.0
    assert update.spent(11.0) == {Phase.COLLECT: 1.0}
    update.phase, update.phase_since = Phase.PAUSE, 11.0
    assert update.spent(11.25) == {Phase.COLLECT: 1.0, Phase.PAUSE: 0.25}
    update.end(UpdateState.ABORTED, ERROR)
    assert update.spent(20.0) == {Phase.COLLECT: 1.0}


def over_a_group(*, two_phase: bool = False, tp_size: int = 2) -> Update:
    """Every rank has begun."""
    header = dataclasses.replace(HEADER, group_name="g", two_phase=two_phase, tp_size=tp_size)
    update = Update(header=header, manifest=MANIFEST, digest=MANIFEST.digest())
    for rank in range(tp_size):
        update.join(rank)
    return update


def say(update: Update, word: str, *ranks: int) -> None:
    for rank in ranks:
        setattr(update.deliveries[rank], word, True)


def test_an_update_that_is_prepared_needs_no_first_bucket_to_begin() -> None:
    update = delivered()
    say(update, "prepared", 0)
    assert (update.unready(), update.missing()) == ([1], [1])
    update.deliver(1, 0, memory(10))
    assert update.unready() == []
    update.start_applying()


def test_over_a_group_the_sender_is_waited_for_then_every_commit() -> None:
    update = over_a_group()
    say(update, "prepared", 0, 1)
    update.start_applying()
    assert (update.waiting_for(0), update.waiting_for(1), update.missing()) == ([0], [0], [0])
    say(update, "committed", 0)
    assert (update.waiting_for(0), update.missing()) == ([], [])
    update.num_posted = update.num_loaded = 2
    assert (update.waiting_for(2), update.missing(), update.complete) == ([], [1], False)
    say(update, "committed", 1)
    assert (update.missing(), update.complete) == ([], True)


def test_over_a_group_an_update_is_complete_when_all_is_loaded() -> None:
    """Until then its sender can still take the bytes back, by going."""
    update = over_a_group()
    say(update, "committed", 0, 1)
    for update.num_posted, update.num_loaded in ((1, 0), (2, 1)):
        assert not update.complete
        assert (update.needs(0), update.needs(1)) == (True, False)
    update.num_loaded = 2
    assert update.complete
    assert (update.needs(0), update.needs(1)) == (False, False)


def test_over_a_group_a_rank_is_needed_until_it_has_committed() -> None:
    update = over_a_group()
    update.num_posted = update.num_loaded = 2
    say(update, "committed", 0)
    assert (update.needs(0), update.needs(1)) == (False, True)


def test_in_two_phases_every_rank_is_needed_until_its_word_to_publish() -> None:
    for update in (over_a_group(two_phase=True), dataclasses.replace(delivered(0, 1), header=TWO_PHASE)):
        say(update, "committed", 0, 1)
        update.num_posted = update.num_loaded = 2
        assert (update.unpublished(), update.complete) == ([0, 1], False)
        assert update.needs(0)
        say(update, "published", 0)
        assert (update.unpublished(), update.needs(0), update.needs(1)) == ([1], False, True)
        say(update, "published", 1)
        assert (update.unpublished(), update.complete, update.needs(1)) == ([], True, False)


def test_the_word_to_publish_is_waited_for_once_all_is_ready() -> None:
    update = over_a_group(two_phase=True)
    say(update, "prepared", 0, 1)
    say(update, "committed", 0, 1)
    update.start_applying()
    update.num_posted, update.phase = 2, Phase.LOAD
    assert update.missing() == []
    update.phase = Phase.DECIDE
    assert update.missing() == [0, 1]
    say(update, "published", 0)
    assert update.missing() == [1]


def test_in_one_phase_no_word_is_needed() -> None:
    assert new_update().unpublished() == []


def test_the_transport_is_told_by_what_the_update_is() -> None:
    assert new_update().transport is Transport.IPC
    assert over_a_group().transport is Transport.DISTRIBUTED
    assert Update(HEADER, Manifest(()), "", model_path="/models/x").transport is Transport.DISK


def test_over_a_group_any_number_of_ranks_may_take_part_but_not_without_end() -> None:
    over = dataclasses.replace(HEADER, group_name="g")
    for tp_size in (1, 2, 7, MAX_RANKS):
        dataclasses.replace(over, tp_size=tp_size).check(2)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_RANKS} may, and rank 0 is enough") as raised:
        dataclasses.replace(over, tp_size=(1 << 32) - 1).check(2)
    assert raised.value.reason is Reason.RANK_OUT_OF_RANGE
    for tp_size in (0, 2):
        with pytest.raises(InvalidRequest, match=rf"rank 2 is outside 0\.\.{tp_size - 1}"):
            dataclasses.replace(over, rank=2, tp_size=tp_size).check(2)


def test_a_group_without_a_printable_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="group_name must be 0 to 128 printable characters"):
        dataclasses.replace(HEADER, group_name="a\nb").check(2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tp_size": 4}, "tp_size 2 against 4"),
        ({"group_name": "h"}, "group_name 'g' against 'h'"),
        ({"two_phase": True}, "two_phase False against True"),
    ],
)
def test_over_a_group_ranks_that_differ_are_told_so(changes: dict[str, object], said: str) -> None:
    update = over_a_group()
    other = dataclasses.replace(update.header, rank=1, **changes)  # type: ignore[arg-type]
    with pytest.raises(UpdateConflict) as raised:
        update.check_same(other, MANIFEST, MANIFEST.digest())
    assert said in raised.value.message


def test_the_engines_ranks_are_its_own_over_a_group_and_those_that_send_otherwise() -> None:
    assert new_update().num_engine_ranks == 2
    assert dataclasses.replace(over_a_group(tp_size=1), engine_tp_size=4).num_engine_ranks == 4
