"""Every file of deploy/ is what its name says."""

import tomllib
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY, documents

FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(DEPLOY)) for path in FILES])
def test_a_file_parses_and_ends_in_a_newline(path: Path) -> None:
    text = path.read_text()
    assert text.endswith("\n")
    assert "\t" not in text
    if path.suffix in {".yaml", ".json"}:
        assert all(documents(path))
    elif path.suffix == ".toml":
        tomllib.loads(text)
