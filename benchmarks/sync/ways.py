"""The ways that are measured, in the order in which one run takes them.

Invariant: first everything that needs the weights as a trainer has them, each tensor in memory of its own, then what
needs them in one exportable buffer: the two never lie on a GPU at once for longer than the move takes.
"""

from dataclasses import dataclass
from enum import Enum

from benchmarks.peers import PEERS

WHOLE = 1 << 50
"""bucket_bytes that no model exceeds."""


class Kind(Enum):
    """Who does the work."""

    FLOOR = "a copy within the trainer's process"
    PEER = "another system's way"
    OURS = "WeightSyncClient, gRPC, the sidecar"
    DIRECT = "the sidecar's own payload, POSTed without gRPC and sidecar"
    REPOST = "the same where the engine has kept the memory: a payload of the sidecar's, POSTed again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One row of the table."""

    name: str
    kind: Kind
    flat: bool = False
    """Whether the weights lie in one exportable buffer."""
    replay: bool = False
    """Whether the sidecar may use the replay loader."""
    whole: bool = True
    """Whether the model goes as one bucket; else as buckets of the shape's ``bucket_bytes``."""


WAYS = (
    Way(name="floor_tensors", kind=Kind.FLOOR),
    *(Way(name=name, kind=Kind.PEER) for name in PEERS),
    Way(name="stock_staged", kind=Kind.OURS),
    Way(name="stock_staged_buckets", kind=Kind.OURS, whole=False),
    Way(name="replay_staged", kind=Kind.OURS, replay=True),
    Way(name="replay_staged_buckets", kind=Kind.OURS, replay=True, whole=False),
    Way(name="floor_flat", kind=Kind.FLOOR, flat=True),
    Way(name="stock_in_place", kind=Kind.OURS, flat=True),
    Way(name="stock_direct", kind=Kind.DIRECT, flat=True),
    Way(name="replay_in_place", kind=Kind.OURS, flat=True, replay=True),
    Way(name="replay_direct", kind=Kind.REPOST, flat=True, replay=True),
)
REFERENCE = "floor_tensors"
"""What ratios are of: all tensors, one after the other, in one call of the device."""


def chosen(names: str, device: str) -> list[Way]:
    """Names with commas between, "all", or groups ("floor", "peers", "stock", "replay"), in the run's own order."""
    groups = {"all": {way.name for way in WAYS}, "peers": set(PEERS)}
    groups |= {
        group: {way.name for way in WAYS if way.name.startswith(group)} for group in ("floor", "stock", "replay")
    }
    wanted: set[str] = set()
    for name in names.split(","):
        found = groups.get(name, {way.name for way in WAYS if way.name == name})
        if not found:
            raise ValueError(f"--ways {name} is none of {', '.join([*groups, *(way.name for way in WAYS)])}")
        wanted |= found
    # On the CPU an engine keeps no memory open between two updates.
    return [way for way in WAYS if way.name in wanted and (way.kind is not Kind.REPOST or device == "cuda")]
