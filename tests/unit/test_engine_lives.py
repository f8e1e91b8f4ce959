"""Whether a server is the same as before, over HTTP to a scripted one."""

import asyncio

import pytest

from sidecar.config import Timeouts
from sidecar.engine.sglang import SGLangEngine
from sidecar.errors import EngineRefused, EngineRestarted
from sidecar.header import PauseMode, Selector
from sidecar.payload import LOAD_FORMAT
from tests.fakes import Fault, ScriptedEngine

LIMIT_S = 30.0


def test_a_version_whose_publishing_lost_its_answer_is_no_sign_of_another_server() -> None:
    async def story(server: ScriptedEngine) -> None:
        engine = SGLangEngine(server.url, Timeouts())
        await engine.probe()
        await engine.pause(PauseMode.RETRACT, LIMIT_S)
        server.fault("/update_weight_version", Fault.LOSE_REPLY)
        publishing = asyncio.create_task(engine.publish("7"))
        while server.weight_version != "7":  # noqa: ASYNC110 - it is no task of this loop
            await asyncio.sleep(0.01)
        await engine.probe()  # as the watch does after a lost answer, while publishing is tried again
        await publishing
        await engine.resume()
        assert (engine.epoch, engine.weight_version) == (1, "7")
        engine.close()

    with ScriptedEngine("0.5.20") as server:
        asyncio.run(story(server))
        assert not server.paused


def test_a_look_after_a_pause_in_answers_tells_the_same_server_from_another() -> None:
    async def story(server: ScriptedEngine) -> None:
        engine = SGLangEngine(server.url, Timeouts())
        await engine.probe()
        await engine.probe()
        assert engine.epoch == 1
        server.restart()
        await engine.probe()
        assert engine.epoch == 2
        engine.close()

    with ScriptedEngine() as server:
        asyncio.run(story(server))


def test_no_step_of_an_update_reaches_another_server_than_it_began_with() -> None:
    async def story(server: ScriptedEngine) -> None:
        engine = SGLangEngine(server.url, Timeouts())
        await engine.probe()
        await engine.pause(PauseMode.RETRACT, LIMIT_S)
        server.restart()
        await engine.probe()
        before = len(server.paths())
        load = engine.load([b""], LOAD_FORMAT, Selector.ALL, weight_version=None)
        steps = (engine.begin(Selector.ALL, LIMIT_S), load, engine.end(), engine.flush(1.0), engine.publish("7"))
        for step in (*steps, engine.resume()):
            with pytest.raises(EngineRestarted, match="was restarted during the update"):
                await step
        assert len(server.paths()) == before
        await engine.pause(PauseMode.RETRACT, LIMIT_S)  # the next update begins with the new server
        await engine.resume()
        engine.close()

    with ScriptedEngine() as server:
        asyncio.run(story(server))


def test_a_refusal_to_go_on_is_tried_again_and_then_told() -> None:
    async def story(server: ScriptedEngine) -> None:
        engine = SGLangEngine(server.url, Timeouts())
        await engine.probe()
        await engine.pause(PauseMode.RETRACT, LIMIT_S)
        with pytest.raises(EngineRefused, match="not now"):
            await engine.resume()
        engine.close()

    with ScriptedEngine() as server:
        server.fault("/continue_generation", Fault.REFUSE, times=3, message="not now")
        asyncio.run(story(server))
        assert server.posts("/continue_generation") == 3
        assert server.paused
