"""The contract, held against the scripted engine in every dialect, and against a real server if one is named.

REAL_ENGINE_URL=http://127.0.0.1:30000 pytest tests/conformance
"""

import os
from collections.abc import Iterator

import pytest
import requests

from tests.conformance.client import EngineUnderTest
from tests.conformance.contract import CHECKS, LORA_CHECKS, Check
from tests.fakes import ScriptedEngine
from tests.fakes.dialects import RELEASES
from tests.fakes.scripted_engine import CHECKPOINT

REAL_ENGINE_URL = os.environ.get("REAL_ENGINE_URL")
ENGINES = [*RELEASES, *(["real"] if REAL_ENGINE_URL else [])]
TOKEN_S = 0.004


@pytest.fixture(scope="module", params=ENGINES)
def engine_under_test(request: pytest.FixtureRequest) -> Iterator[EngineUnderTest]:
    if request.param == "real":
        assert REAL_ENGINE_URL is not None
        info = requests.get(f"{REAL_ENGINE_URL}/server_info", timeout=30).json()
        yield EngineUnderTest(REAL_ENGINE_URL, info["version"], info["tp_size"])
        return
    # The checks load what no model has.
    with ScriptedEngine(request.param, tp_size=2, token_s=TOKEN_S, known_names=CHECKPOINT) as engine:
        yield EngineUnderTest(engine.url, request.param, 2)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_engine_keeps_the_contract(check: Check, engine_under_test: EngineUnderTest) -> None:
    check(engine_under_test)


@pytest.fixture(scope="module", params=RELEASES)
def engine_with_lora(request: pytest.FixtureRequest) -> Iterator[EngineUnderTest]:
    with ScriptedEngine(request.param, server_info={"enable_lora": True}) as engine:
        yield EngineUnderTest(engine.url, request.param, 1)


@pytest.mark.parametrize("check", LORA_CHECKS, ids=lambda check: check.__name__)
def test_an_engine_with_lora_keeps_the_contract(check: Check, engine_with_lora: EngineUnderTest) -> None:
    check(engine_with_lora)
