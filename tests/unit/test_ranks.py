"""How the applier waits for a trainer's ranks: for a bucket, for the commits, for the word to publish."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace

import pytest

from sidecar import refusals
from sidecar.config import Timeouts
from sidecar.errors import DeadlinePassed, SyncError, UpdateConflict
from sidecar.memory import SharedMemory
from sidecar.ranks import Ranks
from sidecar.update import Phase, Update
from tests.unit.test_update_state import HEADER, MANIFEST

SHORT_S, LONG_S = 0.02, 20.0


class Trainer:
    """Two ranks, and whoever waits for them."""

    def __init__(self, *, group_name: str = "", two_phase: bool = False, **seconds: float) -> None:
        header = replace(HEADER, group_name=group_name, two_phase=two_phase)
        self.update = Update(header, MANIFEST, "d")
        for rank in range(2):
            self.update.join(rank)
        self.ranks = Ranks(self._until, Timeouts(**{"bucket": LONG_S, "decide": LONG_S, **seconds}))
        self._change = asyncio.Event()

    async def _until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            await self._change.wait()
            self._change.clear()

    async def after(self, wait: Coroutine[None, None, None], *steps: Callable[[], object]) -> None:
        """``wait`` returns with the last of ``steps``, and not before."""
        waiting = asyncio.ensure_future(wait)
        for step in steps:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
            step()
            self._change.set()
        await asyncio.wait_for(waiting, LONG_S)

    def commit(self, rank: int) -> Callable[[], None]:
        return lambda: setattr(self.update.deliveries[rank], "committed", True)

    def publish(self, rank: int) -> Callable[[], None]:
        return lambda: setattr(self.update.deliveries[rank], "published", True)

    def abort(self) -> None:
        self.update.abort_request = refusals.aborted_by(self.update, 1, "a whim")


def run(story: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(story())


def raised(
    kind: type[SyncError], trainer: Trainer, wait: Coroutine[None, None, None], *steps: Callable[[], object]
) -> str:
    async def story() -> None:
        await trainer.after(wait, *steps)

    with pytest.raises(kind) as error:
        asyncio.run(story())
    return error.value.message


def test_over_a_group_every_bucket_waits_for_the_senders_commit_alone() -> None:
    async def story() -> None:
        trainer = Trainer(group_name="g")
        trainer.commit(1)()
        await trainer.after(trainer.ranks.bucket(trainer.update, 0), trainer.commit(0))
        await trainer.after(trainer.ranks.bucket(trainer.update, 1))
        await trainer.after(trainer.ranks.bucket(trainer.update, 2))

    run(story)


def test_past_the_last_bucket_every_ranks_commit_is_waited_for() -> None:
    async def story() -> None:
        trainer = Trainer(group_name="g")
        trainer.update.num_posted = 2
        await trainer.after(trainer.ranks.bucket(trainer.update, 2), trainer.commit(0), trainer.commit(1))

    run(story)


def test_memory_is_looked_at_again_right_before_it_is_posted() -> None:
    async def story() -> None:
        trainer = Trainer()
        for rank in range(2):
            trainer.update.deliver(rank, 0, SharedMemory("/nowhere/manager.sock", "/torch_1_gone", 64))
        with pytest.raises(SyncError, match="rank 0, bucket 0"):
            await trainer.ranks.bucket(trainer.update, 0)

    run(story)


def test_a_version_is_published_when_every_rank_has_said_so() -> None:
    async def story() -> None:
        trainer = Trainer(two_phase=True)
        await trainer.after(trainer.ranks.decision(trainer.update), trainer.publish(1), trainer.publish(0))

    run(story)


def test_a_wait_that_is_over_names_ranks_and_seconds() -> None:
    trainer = Trainer(group_name="g", bucket=SHORT_S)
    said = raised(DeadlinePassed, trainer, trainer.ranks.bucket(trainer.update, 0))
    assert said.startswith("update 'u1': waited 0.0 s for rank 0 to commit; the engine was not touched")
    trainer = Trainer(two_phase=True, decide=SHORT_S)
    trainer.publish(0)()
    trainer.update.phase, trainer.update.num_posted = Phase.DECIDE, 2
    said = raised(DeadlinePassed, trainer, trainer.ranks.decision(trainer.update))
    assert said == "update 'u1': waited 0.0 s for rank 1 to publish"


@pytest.mark.parametrize("step", ["bucket", "decision"])
def test_an_abort_ends_a_wait_at_once(step: str) -> None:
    trainer = Trainer(group_name="g", two_phase=True)
    wait = trainer.ranks.bucket(trainer.update, 0) if step == "bucket" else trainer.ranks.decision(trainer.update)
    assert "rank 1 aborted update 'u1': a whim" in raised(UpdateConflict, trainer, wait, trainer.abort)


def test_an_abort_before_the_last_word_counts_though_nothing_is_missing_then() -> None:
    trainer = Trainer(two_phase=True)
    trainer.abort()
    for rank in range(2):
        trainer.publish(rank)()
    raised(UpdateConflict, trainer, trainer.ranks.decision(trainer.update))
