"""The sidecar's log: one record, one line, with its fields, whatever is in them."""

import io
import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest

from sidecar import logs
from sidecar.logs import LogForm

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configured() -> Iterator[Configure]:
    """``logs.configure`` into a stream; afterwards the logger is as it was."""
    logger = logging.getLogger(logs.LOGGER)
    before = logger.handlers[:], logger.level, logger.propagate

    def configure(form: LogForm, level: str = "info") -> io.StringIO:
        out = io.StringIO()
        logs.configure(level, form, out)
        return out

    yield configure
    logger.handlers[:], logger.level, logger.propagate = before


LOG = logging.getLogger("sidecar.test")
EVIL = "u\n2026-01-01T00:00:00.000Z INFO sidecar: all is well\x1b[2J"


def test_text_ends_with_the_fields(configured: Configure) -> None:
    out = configured(LogForm.TEXT)
    LOG.info("hello %s", "you", extra={"update_id": "u7", "rank": 1, "bucket": 0, "unknown": "x"})
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO sidecar\.test: hello you \[update_id=u7 rank=1 bucket=0\]\n",
        out.getvalue(),
    )


def test_json_is_an_object_per_line_with_the_fields(configured: Configure) -> None:
    out = configured(LogForm.JSON)
    LOG.warning("hello", extra={"update_id": "u7", "rank": 1})
    entry = json.loads(out.getvalue())
    assert entry.pop("ts").endswith("Z")
    assert entry == {
        "level": "warning", "logger": "sidecar.test", "message": "hello", "update_id": "u7", "rank": 1
    }  # fmt: skip


@pytest.mark.parametrize("form", list(LogForm))
def test_an_id_cannot_forge_a_record(configured: Configure, form: LogForm) -> None:
    out = configured(form)
    LOG.info("update %s", EVIL, extra={"update_id": EVIL})
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def test_a_field_cannot_forge_another_one(configured: Configure) -> None:
    out = configured(LogForm.TEXT)
    LOG.info("an update", extra={"update_id": "u rank=3]", "rank": 1})
    assert out.getvalue().endswith('an update [update_id="u rank=3]" rank=1]\n')


def test_a_traceback_in_text_is_indented(configured: Configure) -> None:
    out = configured(LogForm.TEXT)
    _fail()
    first, *rest = out.getvalue().splitlines()
    assert first.endswith("ERROR sidecar.test: a defect")
    assert all(line.startswith("  ") for line in rest)
    assert rest[-1].endswith("INFO sidecar: all is well\\x1b[2J")


def test_a_traceback_in_json_is_a_field(configured: Configure) -> None:
    out = configured(LogForm.JSON)
    _fail()
    assert "ValueError: u\n" in json.loads(out.getvalue())["exception"]


def _fail() -> None:
    try:
        raise ValueError(EVIL)
    except ValueError:
        LOG.exception("a defect")


def test_only_the_sidecars_own_records_of_that_level_are_written(configured: Configure) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    out = configured(LogForm.TEXT, "warning")
    LOG.info("not this")
    logging.getLogger("sidecarx").warning("nor this")
    assert out.getvalue() == ""
    assert (root.handlers[:], root.level) == before


def test_configuring_again_does_not_write_twice(configured: Configure) -> None:
    before, out = configured(LogForm.TEXT), configured(LogForm.TEXT)
    LOG.info("once")
    assert (before.getvalue(), out.getvalue().count("once")) == ("", 1)
