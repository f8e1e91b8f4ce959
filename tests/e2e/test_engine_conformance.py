"""The real servers keep the contract that the scripted engine is held to, so that the fake cannot drift."""

import pytest

from tests.conformance.client import EngineUnderTest
from tests.conformance.contract import CHECKS, Check
from tests.e2e.engines import Stack, on_every_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@on_every_engine
def test_a_real_server_keeps_the_contract(stack: Stack, check: Check) -> None:
    check(EngineUnderTest(stack.http.url, stack.spec.release, stack.spec.tp_size))
