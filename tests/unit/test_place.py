"""One thing in hand at a time, whoever asks for its end."""

import asyncio

import pytest

from sidecar.errors import Reason, UpdateConflict
from sidecar.header import Header
from sidecar.manifest import Manifest
from sidecar.place import Place
from sidecar.update import Update

HEADER = Header(update_id="u", weight_version="v", rank=0, tp_size=1)


def place(changes: list[None] | None = None) -> Place:
    return Place(lambda: (changes if changes is not None else []).append(None))


def test_a_task_keeps_updates_and_other_tasks_out_until_it_is_released() -> None:
    one = place()
    one.claim("joining a group")
    with pytest.raises(UpdateConflict, match="joining a group"):
        one.check_free(HEADER)
    with pytest.raises(UpdateConflict, match="joining a group"):
        one.claim("fencing")
    one.release()
    one.check_free(HEADER)


def test_an_update_in_hand_keeps_tasks_out() -> None:
    one = place()
    one.take(Update(HEADER, Manifest(()), ""))
    with pytest.raises(UpdateConflict, match="'u'"):
        one.claim("fencing")
    with pytest.raises(UpdateConflict, match="'u'"):
        one.check_free(HEADER)


def test_an_update_that_has_left_makes_room() -> None:
    one = place()
    one.take(Update(HEADER, Manifest(()), ""))
    one.leave()
    one.claim("fencing")


async def test_what_is_done_in_its_place_goes_on_to_its_end_without_its_caller() -> None:
    changes: list[None] = []
    one, may_end, ended = place(changes), asyncio.Event(), list[str]()

    async def work() -> None:
        await may_end.wait()
        ended.append("it")

    caller = asyncio.create_task(one.claiming("work", work))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    with pytest.raises(UpdateConflict, match="work"):
        one.claim("other work")
    assert not await one.ended(0.01)
    may_end.set()
    assert await one.ended(10.0)
    one.claim("other work")
    assert (ended, len(changes)) == (["it"], 1)


async def test_work_that_fails_gives_the_place_back_and_raises() -> None:
    async def fails() -> None:
        raise ConnectionError

    one = place()
    with pytest.raises(ConnectionError):
        await one.claiming("work", fails)
    one.claim("again")


@pytest.mark.parametrize(
    ("error", "is_told"),
    [(ZeroDivisionError("a slip"), True), (UpdateConflict(Reason.UPDATE_IN_PROGRESS, "no"), False)],
)
async def test_a_defect_that_no_caller_hears_of_is_logged(
    caplog: pytest.LogCaptureFixture, error: Exception, is_told: bool
) -> None:
    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise error

    caller = asyncio.create_task(place().claiming("fencing", fails))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0.05)
    assert [record.message for record in caplog.records] == ["fencing: a defect in the sidecar"] * is_told
