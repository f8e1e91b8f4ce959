"""A group beside the trainer's own, over gloo on loopback; receivers are processes of their own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
import torch
import torch.distributed as dist

from adapter.errors import GroupBroken
from adapter.process_group import BroadcastGroup, wait_all

LONG_S = 60.0
SOON_S = 15.0
MUCH = 1 << 26
"""More bytes than the system takes for a process that does not read."""
Open = Callable[..., tuple[BroadcastGroup, list["Receiver"]]]


class Receiver:
    """One of the other ranks."""

    def __init__(self, group: BroadcastGroup, rank: int, sizes: tuple[int, ...]) -> None:
        words = [group.port, group.name, rank, group.world_size, *sizes]
        command = [sys.executable, "-m", "tests.unit.group_receiver", *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        """The next line; waits for it."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def joined() -> Iterator[Open]:
    """Groups with receivers that wait for broadcasts of so many bytes."""
    with ExitStack() as stack:

        def opened(*sizes: int, receivers: int = 1) -> tuple[BroadcastGroup, list[Receiver]]:
            group = BroadcastGroup("weights", 1 + receivers, "gloo", LONG_S, LONG_S)
            stack.callback(group.close)
            others = [Receiver(group, 1 + number, sizes) for number in range(receivers)]
            for other in others:
                stack.callback(other.end)
            group.join()
            assert [other.says() for other in others] == ["joined"] * receivers
            return group, others

        yield opened


@contextmanager
def soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON_S


def tensor(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def test_several_broadcasts_in_flight_arrive_whole_and_in_order_at_all(joined: Open) -> None:
    contents = [b"one", b"the second", b"3", b"and the fourth"]
    group, others = joined(*map(len, contents), receivers=2)
    sent = [group.broadcast(tensor(content)) for content in contents]
    wait_all(sent, time.monotonic() + SOON_S)
    assert all(one.done() for one in sent)
    for other in others:
        assert [bytes.fromhex(other.says()) for _ in contents] == contents


def test_the_trainers_default_group_is_neither_needed_nor_made(joined: Open) -> None:
    group, (other,) = joined(4)
    assert not dist.is_initialized()
    wait_all([group.broadcast(tensor(b"some"))], time.monotonic() + SOON_S)
    assert bytes.fromhex(other.says()) == b"some"
    group.close()
    assert not dist.is_initialized()


def test_a_receiver_that_died_is_noticed_long_before_the_time_out(joined: Open) -> None:
    group, (other,) = joined(4, 4)
    wait_all([group.broadcast(tensor(b"some"))], time.monotonic() + SOON_S)
    other.kill()
    with soon(), pytest.raises(GroupBroken, match="a receiver of the broadcast is gone"):
        wait_all([group.broadcast(torch.zeros(MUCH, dtype=torch.uint8))], time.monotonic() + LONG_S)


def test_a_broadcast_that_nobody_takes_is_waited_for_no_longer_than_said(joined: Open) -> None:
    group, (other,) = joined(MUCH)
    other.process.send_signal(signal.SIGSTOP)
    with soon(), pytest.raises(GroupBroken, match="a broadcast has not ended in time"):
        wait_all([group.broadcast(torch.zeros(MUCH, dtype=torch.uint8))], time.monotonic() + 1.0)
    with soon():
        group.close()


def test_a_group_that_nobody_else_joins_is_broken_after_its_time() -> None:
    group = BroadcastGroup("alone", 2, "gloo", 1.0, LONG_S)
    began = time.monotonic()
    with pytest.raises(GroupBroken, match="not all members joined group alone"):
        group.join()
    assert 0.5 < time.monotonic() - began < SOON_S
    group.close()
    assert not dist.is_initialized()


def test_to_close_a_group_ends_what_its_receivers_wait_for(joined: Open) -> None:
    group, others = joined(4, receivers=2)
    with soon():
        group.close()
        assert [other.says() for other in others] == ["broken", "broken"]
    group.close()  # again: nothing


def test_another_group_of_that_name_can_be_made_once_the_first_is_closed(joined: Open) -> None:
    for content in (b"once", b"again"):
        group, (other,) = joined(len(content))
        wait_all([group.broadcast(tensor(content))], time.monotonic() + SOON_S)
        assert bytes.fromhex(other.says()) == content
        group.close()


def test_who_comes_to_join_after_the_group_was_given_up_is_told_so_at_once() -> None:
    group = BroadcastGroup("given up", 3, "gloo", LONG_S, LONG_S)
    joining = threading.Thread(target=lambda: suppressing(group.join), daemon=True)
    joining.start()
    with ExitStack() as stack:
        others = [Receiver(group, rank, ()) for rank in (1, 2)]
        for other in others:
            stack.callback(other.end)
        over = threading.Event()
        stack.callback(over.set)
        with soon():
            group.close()  # before either of them has started up
            group.turn_away(over.is_set, LONG_S)
            joining.join()
            assert [other.says() for other in others] == ["refused", "refused"]


def test_the_store_is_closed_for_good_once_nobody_is_on_the_way() -> None:
    group = BroadcastGroup("over", 2, "gloo", LONG_S, LONG_S)
    group.close()
    over = threading.Event()
    group.turn_away(over.is_set, LONG_S)
    with soon():
        while not is_open(group.port):
            time.sleep(0.01)
        over.set()
        turning_away("over").join()
    assert not is_open(group.port)


def test_the_store_is_closed_after_its_time_though_somebody_is_on_the_way() -> None:
    group = BroadcastGroup("long over", 2, "gloo", LONG_S, LONG_S)
    group.close()
    with soon():
        group.turn_away(lambda: False, 0.2)
        turning_away("long over").join()
    assert not is_open(group.port)


def turning_away(name: str) -> threading.Thread:
    (thread,) = [thread for thread in threading.enumerate() if thread.name == f"turn away {name}"]
    return thread


def suppressing(join: Callable[[], None]) -> None:
    with suppress(GroupBroken):
        join()


def is_open(port: int) -> bool:
    with socket.socket() as door:
        return door.connect_ex(("127.0.0.1", port)) == 0
