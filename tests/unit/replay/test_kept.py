"""Leases between real processes, and the buckets that are kept under them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from adapter.lease import KeptUnder, Lease
from adapter.replay.kept import MOST, KeptRegions

OWNER = "import sys; from adapter.lease import Lease; lease = Lease(); print(lease.name, flush=True); sys.stdin.read()"
KEEPER = """
import sys
from adapter.lease import KeptUnder
kept = KeptUnder(sys.argv[1])
print("kept", flush=True)
sys.stdin.read()
"""


@contextmanager
def process(script: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process, and the first line that it says."""
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        try:
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


def until(happened: object, timeout_s: float = 10.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.fixture
def kept() -> KeptRegions:
    return KeptRegions(worth_keeping=lambda _: True)


@pytest.fixture
def flat() -> torch.Tensor:
    return torch.zeros(8, dtype=torch.uint8)


def test_a_lease_shows_who_keeps_its_memory_and_ends_when_he_lets_go() -> None:
    lease = Lease()
    assert not lease.is_kept()
    under = KeptUnder(lease.name)
    assert lease.is_kept()
    assert under.is_wanted()
    assert not lease.end(0.01)
    assert not under.is_wanted()
    under.let_go()
    assert lease.end(1)


def test_a_keeper_that_is_killed_keeps_nothing() -> None:
    lease = Lease()
    with process(KEEPER, lease.name) as (keeper, _):
        assert lease.is_kept()
        keeper.send_signal(signal.SIGKILL)
        until(lambda: not lease.is_kept())
    assert lease.end(1)


def test_an_owner_that_is_killed_wants_nothing_and_its_file_goes_with_the_keeper() -> None:
    with process(OWNER) as (owner, name):
        under = KeptUnder(name)
        assert under.is_wanted()
        owner.send_signal(signal.SIGKILL)
        under.wait_until_unwanted()
    assert not under.is_wanted()
    under.let_go()
    assert not (Path("/dev/shm") / name).exists()


def test_no_lease_can_be_kept_that_has_ended_or_is_none(tmp_path: Path) -> None:
    lease = Lease()
    name = lease.name
    lease.end(1)
    with pytest.raises(FileNotFoundError):
        KeptUnder(name)
    with pytest.raises(ValueError, match="not the name of a lease"):
        KeptUnder(f"../../{tmp_path}/x")


def test_a_lease_that_is_forgotten_ends_and_leaves_no_file() -> None:
    lease = Lease()
    name, under = lease.name, KeptUnder(lease.name)
    del lease
    assert not under.is_wanted()
    assert not (Path("/dev/shm") / name).exists()
    under.let_go()


def test_a_bucket_stays_until_its_lease_ends(kept: KeptRegions, flat: torch.Tensor) -> None:
    lease = Lease()
    with kept.in_use():
        region = kept.keep(lease.name, flat)
    assert kept.get(lease.name) is region
    assert lease.is_kept()
    assert lease.end(5)
    assert kept.get(lease.name) is None


def test_a_bucket_stays_while_it_is_in_use(kept: KeptRegions, flat: torch.Tensor) -> None:
    lease = Lease()
    with kept.in_use():
        kept.keep(lease.name, flat)
        assert not lease.end(0.1)
        assert len(kept) == 1
    assert lease.end(5)
    assert len(kept) == 0


def test_a_bucket_goes_with_a_trainer_that_is_killed(kept: KeptRegions, flat: torch.Tensor) -> None:
    with process(OWNER) as (owner, name):
        with kept.in_use():
            kept.keep(name, flat)
        os.kill(owner.pid, signal.SIGKILL)
        until(lambda: len(kept) == 0)


def test_without_a_lease_or_for_one_that_has_ended_nothing_is_kept(kept: KeptRegions, flat: torch.Tensor) -> None:
    lease = Lease()
    lease.end(1)
    with kept.in_use():
        kept.keep("", flat)
        kept.keep(lease.name, flat)
    assert len(kept) == 0


def test_host_memory_is_not_kept(flat: torch.Tensor) -> None:
    kept, lease = KeptRegions(), Lease()
    with kept.in_use():
        kept.keep(lease.name, flat)
    assert not lease.is_kept()


def test_no_more_buckets_are_kept_than_the_bound(kept: KeptRegions, flat: torch.Tensor) -> None:
    leases = [Lease() for _ in range(MOST + 1)]
    with kept.in_use():
        for lease in leases:
            kept.keep(lease.name, flat)
    assert len(kept) == MOST
    assert not leases[-1].is_kept()
    assert all(lease.end(5) for lease in leases)


def test_what_is_given_up_is_not_kept_any_more(kept: KeptRegions, flat: torch.Tensor) -> None:
    lease = Lease()
    with kept.in_use():
        kept.keep(lease.name, flat)
        kept.give_up(lease.name)
    assert len(kept) == 0
    assert not lease.is_kept()
    assert lease.end(1)


def test_a_forked_child_ends_no_lease_of_its_parents() -> None:
    lease = Lease()
    child = os.fork()
    if child == 0:
        lease.ask_back()
        del lease
        os._exit(0)
    os.waitpid(child, 0)
    under = KeptUnder(lease.name)
    assert under.is_wanted()
    under.let_go()
