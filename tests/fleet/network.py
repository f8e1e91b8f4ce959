"""Networks for processes that stand for hosts: one namespace each, joined by a bridge; a link can be cut.

Needs root and `ip`. Invariant: everything is made under names of this process's own, and is gone with the `with` block.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "fleet0"
"""Inside a namespace."""


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace."""

    name: str
    address: str
    link: str
    """The bridge's end of its cable."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command is started through, to run there."""
        return "ip", "netns", "exec", self.name

    def cut(self) -> None:
        """Pull the cable: packets are lost, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """Put it back."""
        _ip("link", "set", self.link, "up")


@dataclass(frozen=True, slots=True)
class Network:
    """A bridge, on which this process has an address, and the hosts on it."""

    bridge: str
    address: str
    hosts: tuple[Host, ...]


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """Make it, and remove it."""
    subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() % 250}"
    bridge = f"wsb{os.getpid() % 100000}"
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        hosts = tuple(_host(stack, bridge, f"{subnet}.{10 + number}", number) for number in range(num_hosts))
        yield Network(bridge, f"{subnet}.1", hosts)


def _host(stack: contextlib.ExitStack, bridge: str, address: str, number: int) -> Host:
    name, link = f"{bridge}n{number}", f"{bridge}v{number}"
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("link", "add", link, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _ip("link", "set", link, "master", bridge, "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
    _ip("-n", name, "link", "set", INTERFACE, "up")
    _ip("-n", name, "link", "set", "lo", "up")
    return Host(name, address, link)


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)
