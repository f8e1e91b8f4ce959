"""docs/troubleshooting.md and compatibility.md quote what the code says; the former has every reason and error."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter import errors
from sidecar.errors import Reason

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
CELLS = re.compile(r"(?<!\\)\|")
QUOTED = re.compile(r"`([^`]+)`")
GAP = "\0"
"""In place of what an f-string fills in."""
ERRORS = {kind.__name__ for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)}


def sentences(node: ast.AST) -> Iterator[str]:
    """Every text in a module but for its docstrings, with a gap where a value goes."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else GAP
            for part in node.values
        )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[sdr]|%\.\d+f|\{\w+\}", GAP, node.value)
    for child in ast.iter_child_nodes(node):
        yield from sentences(child)


def first_cells() -> list[str]:
    """What stands in the first column of every table, but for their heads."""
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [CELLS.split(row)[1].strip() for row in rows]


MESSAGES = [text for cell in first_cells() for text in QUOTED.findall(cell) if text not in ERRORS]
COMPATIBILITY = (REPOSITORY / "docs" / "compatibility.md").read_text()
REFUSALS = re.findall(r"^\|[^|]+\| `([^`|]+)` \|$", COMPATIBILITY.partition("## What is refused")[2], re.MULTILINE)


@pytest.fixture(scope="module")
def source() -> list[str]:
    files = [path for folder in ("sidecar", "adapter") for path in (REPOSITORY / folder).rglob("*.py")]
    return [text for path in files if path.parts[-2] != "v1" for text in sentences(ast.parse(path.read_text()))]


def occurs(message: str, texts: list[str]) -> bool:
    """Whether one text has all literal parts of ``message``, in order."""
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
    return any(pattern.search(text) for text in texts)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_that_the_code_says(message: str, source: list[str]) -> None:
    assert occurs(message, source)


@pytest.mark.parametrize("message", REFUSALS)
def test_what_is_refused_is_refused_in_the_words_of_the_code(message: str, source: list[str]) -> None:
    assert occurs(message, source)


def test_messages_that_nobody_says_would_be_found(source: list[str]) -> None:
    assert len(MESSAGES) > 100
    assert not occurs("the engine has gone ... fishing", source)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_in_a_row_of_its_own_or_with_others(reason: Reason) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{reason}`" in CELLS.split(line)[2]]
    assert rows, "no row has it in its second column"


@pytest.mark.parametrize("error", sorted(ERRORS))
def test_every_error_of_the_adapter_is_there(error: str) -> None:
    assert f"`{error}`" in PAGE


def test_every_name_in_capitals_is_a_reason_or_a_code() -> None:
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PAGE))
    assert named <= set(Reason)
