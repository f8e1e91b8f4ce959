"""The trainer's progress line, on a terminal that only remembers."""

import io

import pytest

from adapter.progress import CLEAR_LINE, Progress

GIB = 2**30


class Terminal(io.StringIO):
    def __init__(self, *, is_one: bool = True) -> None:
        super().__init__()
        self._is_one = is_one

    def isatty(self) -> bool:
        return self._is_one

    @property
    def lines(self) -> list[str]:
        """What was drawn, one over the other."""
        return [line.removesuffix(CLEAR_LINE) for line in self.getvalue().replace("\n", "").split("\r")[1:]]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def send(out: io.StringIO, rank: int = 0, environ: dict[str, str] | None = None) -> None:
    """Two buckets, each filled for a second and waited for two."""
    clock = Clock()
    with (progress := Progress("weights 7", rank, [GIB, 3 * GIB], out, environ or {}, clock, lambda: 120)):
        for _ in range(2):
            progress.phase("filling")
            clock.now += 1.0
            progress.phase("waiting")
            clock.now += 2.0
            progress.loaded()


def test_a_line_tells_how_far_how_fast_and_what_for() -> None:
    terminal = Terminal()
    send(terminal)
    assert terminal.lines[:3] == [
        "weights 7: bucket 0/2, 0.00 of 4.00 GiB, 0.00 GiB/s, filling",
        "weights 7: bucket 0/2, 0.00 of 4.00 GiB, 0.00 GiB/s, waiting (filling 1.0 s)",
        "weights 7: bucket 1/2, 1.00 of 4.00 GiB, 0.33 GiB/s, waiting (filling 1.0 s)",
    ]
    assert terminal.lines[-1] == (
        "weights 7: bucket 2/2, 4.00 of 4.00 GiB, 0.67 GiB/s, ended (filling 2.0 s, waiting 4.0 s)"
    )
    assert terminal.getvalue().endswith("\n")


def test_a_terminal_is_written_to_ten_times_a_second_at_most() -> None:
    terminal, clock = Terminal(), Clock()
    with (progress := Progress("weights", 0, [1] * 1000, terminal, {}, clock)):
        for _ in range(1000):
            clock.now += 0.001
            progress.loaded()
    assert 10 <= len(terminal.lines) <= 12
    assert "bucket 1000/1000" in terminal.lines[-1]


@pytest.mark.parametrize(
    ("out", "rank", "environ"),
    [
        pytest.param(Terminal(is_one=False), 0, {}, id="no-terminal"),
        pytest.param(Terminal(), 1, {}, id="another-rank"),
        pytest.param(Terminal(), 0, {"WEIGHT_SYNC_PROGRESS": "0"}, id="switched-off"),
    ],
)
def test_nothing_is_written_where_nobody_looks(out: Terminal, rank: int, environ: dict[str, str]) -> None:
    send(out, rank, environ)
    assert out.getvalue() == ""


def test_a_terminal_that_goes_away_stops_nothing() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    send(Gone())
    closed = Terminal()
    closed.close()
    send(closed)


def test_a_line_never_wraps() -> None:
    terminal = Terminal()
    with (progress := Progress("weights", 0, [1], terminal, {}, Clock(), lambda: 20)):
        progress.phase("filling")
    assert {len(line) for line in terminal.lines} == {19}
