"""An SGLang server in a torch.distributed group, and its loads from there, as each release has it.

Invariant: a load names a group only after this very server was seen to join it. Facts borrowed (SGLang 0.5.15.post1 to
0.5.23, model_executor/model_runner*): joining and receiving hold up the scheduler until the others come, for torch's
own 30 minutes if need be; a peer whose connection closes ends both with a 400. A store that cannot be connected to is
tried again and again for as long (torch's TCPStore), which is why it is looked at here first.
"""

import asyncio
from collections.abc import Mapping

from sidecar.engine.sglang import SGLangEngine
from sidecar.errors import EngineRefused, Reason, UnsuitableEngine
from sidecar.group import Group
from sidecar.header import Selector
from sidecar.payload import LOAD_FORMAT

INIT, DESTROY = "/init_weights_update_group", "/destroy_weights_update_group"
RECEIVE = "/update_weights_from_distributed"
REACH_S = 5.0
NEXT_ADDRESS_S = 0.25
"""Of a name with several: one that does not answer does not keep the next one waiting."""


class GroupEngine(SGLangEngine):
    """One SGLang server."""

    async def reach(self, group: Group) -> None:
        """See that the store is there, from this host, the engine's (first node's); raises ``UnsuitableEngine``."""
        host = group.master_address.strip("[]")  # as torch takes it out of an URL
        try:
            async with asyncio.timeout(REACH_S):
                _, writer = await asyncio.open_connection(host, group.master_port, happy_eyeballs_delay=NEXT_ADDRESS_S)
        except (OSError, TimeoutError, UnicodeError) as error:  # the last for what cannot be a host's name
            raise _unreachable(group, error) from error
        writer.close()

    async def join_group(self, group: Group) -> None:
        """Join; returns once all members have. Raises ``EngineError``."""
        body: dict[str, object] = {
            "master_address": group.master_address,
            "master_port": group.master_port,
            "rank_offset": group.rank_offset,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._post(INIT, body, self._timeouts.group)

    async def leave_group(self, name: str) -> bool:
        """Leave; whether it was in it. Closes its connections, so that members who wait for this one are told."""
        try:
            await self._post(DESTROY, {"group_name": name}, self._timeouts.probe)
        except EngineRefused:
            return False
        return True

    async def receive(self, tensors: Mapping[str, object], group_name: str, selector: Selector) -> None:
        """Load one bucket from the group's rank 0; ``tensors``: names, dtypes and shapes. Raises ``EngineError``."""
        body = {**tensors, "group_name": group_name, "load_format": LOAD_FORMAT, "flush_cache": False}
        if self._bound[1].has_selector:
            body["selector"] = selector.value
        await self._post(RECEIVE, body, self._timeouts.load)


def _unreachable(group: Group, error: Exception) -> UnsuitableEngine:
    place = f"{group.master_address}:{group.master_port}"
    why = f"no answer within {REACH_S:.0f} s" if isinstance(error, TimeoutError) else str(error)
    message = (
        f"group {group.name!r}: the trainer's store at {place} cannot be reached from the engine's host ({why}); "
        "is the trainer gone, a firewall between, or its address another one (Fleet(address=...))?"
    )
    return UnsuitableEngine(Reason.GROUP_UNREACHABLE, message, groupName=group.name, address=place)
