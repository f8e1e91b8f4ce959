"""Who this process is among the trainer's tensor-parallel ranks, and on which of the engine's nodes it lives.

Pure. Invariant: a ``Membership`` that exists is consistent; every mistake of the caller is a ``ValueError`` that says
what to give instead. Torch is not imported: a mesh is known by what it can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Mesh(Protocol):
    """What is needed of a ``torch.distributed.device_mesh.DeviceMesh``."""

    @property
    def ndim(self) -> int:
        """Its dimensions."""

    def size(self, mesh_dim: int | None = None) -> int:
        """Its ranks."""

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        """This process's place in it."""

    def get_group(self, mesh_dim: int | str | None = None) -> Any:
        """Its process group."""


@dataclass(frozen=True, slots=True)
class Membership:
    """One rank of ``size``; the engine's TP rank of the same number lives beside it."""

    rank: int
    size: int
    nnodes: int = 1
    """Nodes of the engine; the ranks are spread over them evenly, in order."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"tp_rank {self.rank} is outside 0..{self.size - 1}, the ranks that tp_size names")
        if self.nnodes < 1 or self.size % self.nnodes:
            raise ValueError(f"{self.size} ranks cannot be spread evenly over nnodes={self.nnodes}")

    @property
    def node_rank(self) -> int:
        """This rank's node."""
        return self.rank // (self.size // self.nnodes)

    @property
    def leads_node(self) -> bool:
        """Whether it is the first rank of its node, which starts that node's server."""
        return self.rank % (self.size // self.nnodes) == 0

    def node_of(self, rank: int) -> int:
        """Another rank's node."""
        return rank // (self.size // self.nnodes)


def find_membership(
    mesh: Mesh | None, tp_rank: int | None, tp_size: int | None, nnodes: int, environ: Mapping[str, str]
) -> Membership:
    """From the mesh if there is one, else from the numbers, else from torchrun's variables, else a rank on its own."""
    if mesh is not None:
        return _from_mesh(mesh, tp_rank, tp_size, nnodes)
    if tp_rank is not None or tp_size is not None:
        return _from_numbers(tp_rank, tp_size, nnodes)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _from_torchrun(nnodes, environ)
    return Membership(0, 1, nnodes)


def check_mesh(mesh: Mesh) -> None:
    """Raise ``ValueError`` for what is no mesh of one dimension; all of its ranks find the same."""
    if not hasattr(mesh, "get_local_rank"):
        raise ValueError(f"device_mesh_cpu is a {type(mesh).__name__}, not a DeviceMesh; see init_device_mesh of torch")
    if mesh.ndim != 1:
        raise ValueError(
            f"device_mesh_cpu has {mesh.ndim} dimensions; pass the one of the tensor-parallel ranks, such as mesh['tp']"
        )


def _from_mesh(mesh: Mesh, tp_rank: int | None, tp_size: int | None, nnodes: int) -> Membership:
    check_mesh(mesh)
    member = Membership(mesh.get_local_rank(), mesh.size(), nnodes)
    if tp_size not in (None, member.size) or tp_rank not in (None, member.rank):
        raise ValueError(
            f"tp_rank={tp_rank} and tp_size={tp_size} contradict device_mesh_cpu, where this is rank {member.rank} "
            f"of {member.size}; leave them out"
        )
    return member


def _from_numbers(tp_rank: int | None, tp_size: int | None, nnodes: int) -> Membership:
    if tp_size is None:
        raise ValueError(f"tp_rank={tp_rank} needs tp_size as well")
    if tp_rank is None and tp_size > 1:
        raise ValueError(
            f"tp_size={tp_size} needs tp_rank as well, or device_mesh_cpu: every rank makes its own engine"
        )
    return Membership(tp_rank or 0, tp_size, nnodes)


def _from_torchrun(nnodes: int, environ: Mapping[str, str]) -> Membership:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local_size = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else size
    seen = max(1, size // local_size)
    if nnodes not in (1, seen):
        raise ValueError(f"nnodes={nnodes}, but torchrun's WORLD_SIZE={size} and LOCAL_WORLD_SIZE={local_size}")
    return Membership(rank, size, seen)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.isdigit():
        raise ValueError(
            f"the environment's {name}={text!r} is no number; give device_mesh_cpu, or tp_rank and tp_size"
        )
    return int(text)
