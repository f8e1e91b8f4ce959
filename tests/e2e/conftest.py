"""The servers, one at a time, each started once for all tests that name it."""

from collections.abc import Iterator

import pytest

from tests.e2e.engines import EngineSpec, Stack, open_stack


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The server that the test's parameter names, with its sidecar and its trainer ranks."""
    spec: EngineSpec = request.param
    with open_stack(spec, tmp_path_factory.mktemp("e2e")) as running:
        yield running
