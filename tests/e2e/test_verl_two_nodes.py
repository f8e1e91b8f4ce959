"""One SGLang server of two nodes on one machine: each node's first rank starts its node, one sidecar serves both."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapter.demo import tiny_model
from adapter.demo.engine_http import EngineHttp
from tests.e2e.verl_ranks import (
    Belongings,
    Failure,
    VerlRank,
    belongings,
    call_all,
    engine_arguments,
    greedy,
    make_all,
    update_all,
    verl_ranks,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DEATH_TOLD_S = 60.0  # SGLang itself sleeps for 5 seconds before it goes


@dataclass(frozen=True, slots=True)
class TwoNodes:
    """Two ranks, each with a node of its own."""

    ranks: list[VerlRank]
    folder: Path
    url: str
    belongings: list[Belongings]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("nodes")

    def arguments(rank: int) -> dict[str, Any]:
        given = engine_arguments(folder, 2, nnodes=2, log_dir=str(folder / "logs"))
        return {**given, "env": {**given["env"], "SGLANG_CPU_OMP_THREADS_BIND": str(rank)}}

    with verl_ranks(folder) as ranks:
        described = make_all(ranks, arguments)
        assert all(isinstance(answer, dict) for answer in described), described
        mine = [belongings(rank, described[0], keeps_logs=True) for rank in ranks]
        yield TwoNodes(ranks, folder, described[0]["server_url"], mine)


def test_one_post_updates_both_nodes_as_a_load_from_disk_does(two_nodes: TwoNodes) -> None:
    http, ranks = EngineHttp(two_nodes.url), two_nodes.ranks
    shown = []
    for seed in (1, 2):
        assert [result["num_posts"] for result in update_all(ranks, seed)] == [1, 1]
        first, second = call_all(ranks, "generate", **greedy())
        assert first == second
        shown.append((first["output_ids"], http.rank_checksums()))
    http.load_from_disk(tiny_model.save_checkpoint(two_nodes.folder / "disk", tiny_model.random_weights(1)))
    assert http.rank_checksums() == shown[0][1] != shown[1][1]
    assert shown[0][0] != shown[1][0]


def test_a_node_that_is_killed_is_reported_to_every_rank_with_the_end_of_its_log(two_nodes: TwoNodes) -> None:
    """Last in this file: it ends the engine."""
    ranks = two_nodes.ranks
    for rank in ranks:
        rank.tell("generate", arguments=greedy(4000))
    time.sleep(1.0)
    _kill_scheduler(two_nodes.belongings[1])
    told = [rank.hear(DEATH_TOLD_S) for rank in ranks]
    assert told[0] == told[1], "in the middle of a call"
    for failure in (*told, *update_all(ranks, 2), *call_all(ranks, "generate", **greedy(collective=False))):
        _assert_tells_the_death(failure, two_nodes.folder / "logs")
    said = "weight-sync: the SGLang server has ended unexpectedly"
    for rank in ranks:
        rank.process.wait_until(lambda rank=rank: said in rank.process.log_text(), DEATH_TOLD_S)  # type: ignore[misc]
    assert call_all(ranks, "shutdown") == [None, None]
    assert [part.left() for part in two_nodes.belongings] == [[], []]
    logs = sorted(path.name for path in (two_nodes.folder / "logs").iterdir())
    assert logs == ["reaper.log", "server-0.log", "server-1.log", "sidecar.log"]


def _kill_scheduler(node: Belongings) -> None:
    """One of SGLang's own processes; the server follows it."""
    victims = [process for process in node.processes if "scheduler" in "".join(process.cmdline())]
    assert len(victims) == 1
    victims[0].kill()
    psutil.wait_procs(victims, timeout=5)


def _assert_tells_the_death(failure: Failure, logs: Path) -> None:
    assert failure.kind == "LaunchError", failure
    assert f"the SGLang server has ended; the end of {logs}/server-" in failure.message
    assert len(failure.message) > 300
