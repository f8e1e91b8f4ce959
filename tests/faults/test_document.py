"""The matrix and its document."""

from pathlib import Path

from tests.faults import document, matrix
from tests.faults.matrix import Impossible, What, When, Who

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"


def test_the_document_is_what_the_matrix_says() -> None:
    assert DOCUMENT.read_text() == document.render(), "run: python -m tests.faults.document > docs/faults.md"


def test_every_combination_is_in_the_matrix_and_those_that_cannot_be_say_why() -> None:
    cells = list(matrix.cells())
    assert len({str(cell) for cell in cells}) == len(cells)
    assert len({(cell.who, cell.what, cell.when) for cell in cells}) == len(Who) * len(What) * len(When)
    assert all(cell.expected.why for cell in cells if isinstance(cell.expected, Impossible))
