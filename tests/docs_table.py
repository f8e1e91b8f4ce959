"""Writes the settings' table into docs/configuration.md, between its two marks: ``make docs``."""

from pathlib import Path

from sidecar import settings

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
BEGIN, END = "<!-- settings: made by `make docs` -->\n", "<!-- end of settings -->\n"


def with_table(page: str) -> str:
    """The page with its table as the code has it now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + settings.table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
