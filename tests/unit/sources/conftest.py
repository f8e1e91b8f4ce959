"""Three ranks: an odd number, so that cuts are uneven."""

from collections.abc import Iterator

import pytest

from tests.fakes.gloo_ranks import GlooRanks, gloo_ranks


@pytest.fixture(scope="package")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlooRanks]:
    """A trainer of three."""
    with gloo_ranks(3, tmp_path_factory.mktemp("gloo")) as running:
        yield running
