"""What is made of a call whose answer was lost."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from sidecar import fate
from sidecar.errors import EngineError, EngineLost, EngineRefused, EngineRestarted, EngineUnreachable, Reason
from sidecar.header import Header
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.memory import Placement, SharedMemory
from sidecar.update import Update
from tests.fakes import SharedFile, shared_memory

HERE, TWO_NODES = Placement(), Placement(num_here=1)
LOST = EngineLost(Reason.ENGINE_LOST, "/some_step was sent, but no answer came")


@dataclass
class Engine:
    """Answers, or fails to."""

    is_open: bool = False
    served: str = ""
    serves_after_abort: str = ""
    failure: EngineError | None = None
    asked: list[str] = field(default_factory=list)

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.failure:
            raise self.failure

    async def settle(self, lost: EngineLost) -> None:
        assert lost is LOST
        self._ask("settle")

    async def session_is_open(self) -> bool:
        self._ask("session")
        return self.is_open

    async def serves(self, weight_version: str) -> bool:
        self.asked.append("serves")
        return self.served == weight_version

    async def abort_requests(self) -> None:
        """The bucket gets its turn."""
        self._ask("abort")
        self.served = self.serves_after_abort or self.served


@pytest.fixture
def files() -> Iterator[list[SharedFile]]:
    """By rank."""
    with SharedFile(bytes(64)) as first, SharedFile(bytes(64)) as second:
        yield [first, second]


def update_of(files: list[SharedFile], placement: Placement = HERE) -> Update:
    header = Header(update_id="u", weight_version="7", rank=0, tp_size=2)
    bucket = BucketSpec(64, (TensorSpec("w", "float32", (4,), 0, 16),))
    update = Update(header, Manifest((bucket,)), "digest", placement)
    for rank, file in enumerate(files):
        update.join(rank)
        update.deliver(rank, 0, SharedMemory("/manager", file.name, 64))
    return update


def was_loaded(engine: Engine, files: list[SharedFile], weight_version: str | None = None) -> bool:
    return asyncio.run(_was_loaded(engine, files, weight_version))


async def _was_loaded(engine: Engine, files: list[SharedFile], weight_version: str | None) -> bool:
    settled = await fate.is_settled(engine, 0, LOST)
    return settled and await fate.was_loaded(engine, update_of(files), 0, weight_version)


@pytest.mark.parametrize("is_open", [True, False])
def test_the_engine_tells_whether_a_session_is_open(is_open: bool) -> None:
    assert asyncio.run(fate.session_is_open(Engine(is_open), LOST)) is is_open


def test_a_session_that_cannot_be_asked_for_leaves_the_call_lost() -> None:
    engine = Engine(failure=EngineUnreachable(Reason.ENGINE_UNREACHABLE, "gone"))
    with pytest.raises(EngineLost) as raised:
        asyncio.run(fate.session_is_open(engine, LOST))
    assert raised.value is LOST
    assert raised.value.__cause__ is engine.failure


def test_an_engine_that_was_restarted_has_no_session_to_ask_for() -> None:
    engine = Engine(failure=EngineRestarted(Reason.ENGINE_RESTARTED, "another server"))
    with pytest.raises(EngineRestarted):
        asyncio.run(fate.session_is_open(engine, LOST))


def test_a_bucket_is_loaded_once_every_rank_has_let_go_of_it(files: list[SharedFile]) -> None:
    assert not was_loaded(Engine(), files)
    shared_memory.release(files[0].name)
    assert not was_loaded(Engine(), files), "one rank of two"
    shared_memory.release(files[1].name)
    assert was_loaded(Engine(), files)


def test_the_counts_say_nothing_before_the_engine_has_dealt_with_the_bucket(files: list[SharedFile]) -> None:
    for file in files:
        shared_memory.release(file.name)
    engine = Engine(failure=EngineRefused(Reason.ENGINE_REFUSED, "no"))
    assert not was_loaded(engine, files)
    assert engine.asked == ["settle"]


def test_memory_that_is_gone_was_not_let_go(files: list[SharedFile]) -> None:
    for file in files:
        file.close()
    assert not was_loaded(Engine(), files)


def test_a_version_that_came_with_the_bucket_tells_that_it_is_loaded(files: list[SharedFile]) -> None:
    assert was_loaded(Engine(served="7"), files, weight_version="7")
    assert not was_loaded(Engine(served="6"), files, weight_version="7")
    waits_for_requests = Engine(served="6", serves_after_abort="7")
    assert was_loaded(waits_for_requests, files, weight_version="7")
    assert waits_for_requests.asked[-2:] == ["abort", "serves"]
    assert not was_loaded(Engine(served="7"), files), "a version that is published later says nothing of a bucket"


def test_what_another_host_did_with_its_memory_cannot_be_told_from_here(files: list[SharedFile]) -> None:
    shared_memory.release(files[0].name)
    files[1].close()  # as it looks where it never was
    update = update_of(files, TWO_NODES)
    assert not asyncio.run(fate.was_loaded(Engine(), update, 0, None))
    (note,) = update.notes
    assert note.startswith(
        "the answer to the load of bucket 0 was lost; whether ranks [1] have loaded it cannot be told"
    )
    assert "their memory is on another host" in note


def test_memory_here_that_was_not_let_go_tells_enough(files: list[SharedFile]) -> None:
    files[1].close()
    update = update_of(files, TWO_NODES)
    assert not asyncio.run(fate.was_loaded(Engine(), update, 0, None))
    assert update.notes == []


def test_the_memory_of_another_node_on_this_host_tells_as_much_as_its_own(files: list[SharedFile]) -> None:
    shared_memory.release(files[0].name)
    update = update_of(files, TWO_NODES)
    assert not asyncio.run(fate.was_loaded(Engine(), update, 0, None))
    shared_memory.release(files[1].name)
    assert asyncio.run(fate.was_loaded(Engine(), update, 0, None))
    assert update.notes == []


def test_a_version_that_came_with_the_bucket_tells_of_every_host(files: list[SharedFile]) -> None:
    files[1].close()
    update = update_of(files, TWO_NODES)
    assert asyncio.run(fate.was_loaded(Engine(served="7"), update, 0, "7"))
