"""Prepared copies do what copying one by one does, whatever lies where."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter.replay.copies import LARGE_BYTES, Copies, Pair

DTYPES = [torch.bfloat16, torch.float32, torch.int64, torch.uint8]
BYTES = 4096


Drawn = tuple[int, int, int, torch.dtype, bool]
"""Target byte, source byte, elements, dtype, and whether the source has gaps."""


@st.composite
def pairs(draw: st.DrawFn) -> list[Drawn]:
    """Targets that follow each other with gaps; sources anywhere, or right after the one before."""
    drawn: list[Drawn] = []
    to = 0
    for _ in range(draw(st.integers(1, 8))):
        dtype = draw(st.sampled_from(DTYPES))
        size = dtype.itemsize
        to = -(-(to + draw(st.sampled_from([0, 0, 1, 8, 64]))) // size) * size
        elements = draw(st.integers(0, 40))
        source = draw(st.integers(0, (BYTES - 2 * elements * size) // size)) * size
        follows: bool = draw(st.booleans())
        if drawn and follows:
            last = drawn[-1]
            source = -(-(last[1] + last[2] * last[3].itemsize) // size) * size
        drawn.append((to, source, elements, dtype, draw(st.booleans())))
        to += elements * size
    return drawn


def views(target: torch.Tensor, source: torch.Tensor, drawn: list[Drawn]) -> list[Pair]:
    found = []
    for to, start, elements, dtype, strided in drawn:
        step = 2 if strided and start + 2 * elements * dtype.itemsize <= BYTES else 1
        end = start + step * elements * dtype.itemsize
        if end <= BYTES:
            writes = target[to : to + elements * dtype.itemsize].view(dtype)
            found.append((writes, source[start:end].view(dtype)[::step]))
    return found


@given(pairs(), st.integers(0, 3))
def test_any_copies_give_the_same_bytes_as_one_by_one(drawn: list[Drawn], shift: int) -> None:
    source = torch.randint(0, 256, (BYTES + 8 * shift,), dtype=torch.uint8)[8 * shift :]
    prepared, expected = torch.zeros(BYTES, dtype=torch.uint8), torch.zeros(BYTES, dtype=torch.uint8)
    Copies(views(prepared, source, drawn)).run()
    for target, read in views(expected, source, drawn):
        target.copy_(read)
    assert torch.equal(prepared, expected)


def test_they_can_be_made_again_from_other_bytes() -> None:
    source, target = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    copies = Copies([(target[:32], source[:32]), (target[32:], source[32:])])
    for value in (1, 2):
        source.fill_(value)
        copies.run()
        assert torch.equal(target, source)


def test_a_dtype_that_differs_is_converted() -> None:
    target = torch.zeros(3, dtype=torch.bfloat16)
    Copies([(target, torch.tensor([1.0, 2.0, 3.0]))]).run()
    assert target.tolist() == [1.0, 2.0, 3.0]


def test_large_neighbours_are_one_copy() -> None:
    source = torch.randint(0, 256, (2 * LARGE_BYTES,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    copies = Copies([(target[:LARGE_BYTES], source[:LARGE_BYTES]), (target[LARGE_BYTES:], source[LARGE_BYTES:])])
    assert len(copies) == 1
    copies.run()
    assert torch.equal(target, source)
