"""An SGLang server in a torch.distributed group, and its loads from there, as each release has it.

Invariant: a load names a group only after this very server was seen to join it. Facts borrowed (SGLang 0.5.15.post1 to
0.5.23, model_executor/model_runner*): joining and receiving hold up the scheduler until the others come, for torch's
own 30 minutes if need be; a peer whose connection closes ends both with a 400.
"""

from collections.abc import Mapping

from sidecar.engine.sglang import SGLangEngine
from sidecar.errors import EngineRefused
from sidecar.group import Group
from sidecar.payload import LOAD_FORMAT
from sidecar.update import Selector

INIT, DESTROY = "/init_weights_update_group", "/destroy_weights_update_group"
RECEIVE = "/update_weights_from_distributed"


class GroupEngine(SGLangEngine):
    """One SGLang server."""

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
