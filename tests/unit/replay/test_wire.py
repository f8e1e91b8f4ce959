"""Sidecar and loader share no code, so what they say to each other stands in both: here it is held together."""

from adapter import lease
from adapter.replay import header as headers
from adapter.replay import verdict as loaders
from sidecar import memory, replay, verdicts


def test_both_ends_have_the_same_words() -> None:
    assert replay.MAGIC == headers.MAGIC
    assert {o.name: o.value for o in verdicts.Outcome} == {o.name: o.value for o in loaders.Outcome}
    assert verdicts.SLOT_BYTES == loaders.SLOT_BYTES
    assert loaders.NAME.fullmatch(verdicts.VerdictFile("unix:/x.sock").name)
    assert memory.LEASE.pattern == lease.NAME.pattern
