"""Which rank this is: from a mesh, from numbers, from torchrun's environment."""

import pytest

from adapter.membership import Membership, find_membership


class MeshOf:
    """A mesh as far as membership looks at it."""

    def __init__(self, rank: int, size: int, ndim: int = 1) -> None:
        self.rank, self._size, self._ndim = rank, size, ndim

    @property
    def ndim(self) -> int:
        return self._ndim

    def size(self, mesh_dim: int | None = None) -> int:
        return self._size

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        return self.rank

    def get_group(self, mesh_dim: int | str | None = None) -> None:
        return None


def find(
    mesh: MeshOf | None = None, tp_rank: int | None = None, tp_size: int | None = None, nnodes: int = 1, **env: str
) -> Membership:
    return find_membership(mesh, tp_rank, tp_size, nnodes, env)


def test_a_mesh_says_who_this_is_whatever_the_environment_says() -> None:
    assert find(MeshOf(1, 4), RANK="7", WORLD_SIZE="8") == Membership(1, 4)


def test_numbers_do_without_a_mesh() -> None:
    assert find(tp_rank=1, tp_size=2, RANK="7", WORLD_SIZE="8") == Membership(1, 2)


def test_torchruns_environment_does_without_either() -> None:
    assert find(RANK="3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4") == Membership(3, 4)


def test_torchruns_local_world_tells_the_nodes() -> None:
    assert find(RANK="3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2") == Membership(3, 4, nnodes=2)


def test_alone_is_a_rank_too() -> None:
    assert find() == Membership(0, 1)
    assert find(tp_size=1) == Membership(0, 1)


def test_ranks_are_spread_over_the_nodes_in_order() -> None:
    ranks = [Membership(rank, 4, nnodes=2) for rank in range(4)]
    assert [rank.node_rank for rank in ranks] == [0, 0, 1, 1]
    assert [rank.leads_node for rank in ranks] == [True, False, True, False]
    assert [ranks[0].node_of(other) for other in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("ndim", [0, 2, 3])
def test_a_mesh_of_other_dimensions_is_refused_with_what_to_pass(ndim: int) -> None:
    with pytest.raises(ValueError, match=rf"has {ndim} dimensions; pass .* mesh\['tp'\]"):
        find(MeshOf(0, 2, ndim))


def test_something_else_than_a_mesh_is_refused_by_its_type() -> None:
    with pytest.raises(ValueError, match="device_mesh_cpu is a list, not a DeviceMesh"):
        find_membership([0, 1], None, None, 1, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{"tp_size": 4}, {"tp_rank": 1}])
def test_numbers_that_contradict_the_mesh_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="contradict device_mesh_cpu, where this is rank 0 of 2"):
        find(MeshOf(0, 2), **numbers)  # type: ignore[arg-type]


def test_numbers_that_repeat_the_mesh_are_no_mistake() -> None:
    assert find(MeshOf(1, 2), tp_rank=1, tp_size=2) == Membership(1, 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tp_size": 2}, "tp_size=2 needs tp_rank as well"),
        ({"tp_rank": 0}, "tp_rank=0 needs tp_size as well"),
        ({"tp_rank": 2, "tp_size": 2}, r"tp_rank 2 is outside 0\.\.1"),
        ({"tp_rank": -1, "tp_size": 2}, r"tp_rank -1 is outside 0\.\.1"),
        ({"tp_rank": 0, "tp_size": 3, "nnodes": 2}, "3 ranks cannot be spread evenly over nnodes=2"),
        ({"tp_rank": 0, "tp_size": 2, "nnodes": 0}, "nnodes=0"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is no number"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "nnodes": 4}, "nnodes=4, but torchrun's"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find(**given)  # type: ignore[arg-type]
