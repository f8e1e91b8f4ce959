"""What becomes of an engine that does not come up or whose trainer dies, and of ranks that have no mesh."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from adapter.launch import free_port
from tests.e2e.verl_ranks import (
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

GONE_S = 40.0  # the reaper leaves the server its grace


def test_ranks_without_a_mesh_do_and_a_trainer_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    where = {"sidecar": f"unix:{tmp_path / 's.sock'}", "port": free_port()}
    with verl_ranks(tmp_path, mesh=False) as ranks:
        described = make_all(ranks, engine_arguments(tmp_path, 2, log_dir=str(tmp_path / "logs"), **where))
        assert all(isinstance(answer, dict) for answer in described), described
        assert described[0]["server_url"] == described[1]["server_url"]
        assert [result["num_posts"] for result in update_all(ranks, 1)] == [1, 1]
        first, second = call_all(ranks, "generate", **greedy())
        assert first["output_ids"] == second["output_ids"]
        mine = belongings(ranks[0], described[0], keeps_logs=True)
        os.kill(ranks[0].process.pid, signal.SIGKILL)
        assert mine.wait_until_gone(GONE_S) == []
        failure = ranks[1].call("generate", **greedy())
        assert failure.kind == "EngineUnreachable"


def test_a_server_that_does_not_come_up_is_an_error_of_every_rank_and_leaves_nothing(tmp_path: Path) -> None:
    with verl_ranks(tmp_path) as ranks:
        first, second = make_all(
            ranks, engine_arguments(tmp_path, 2, no_such_argument=7, log_dir=str(tmp_path / "logs"))
        )
        assert (first.kind, second.kind) == ("LaunchError", "LaunchError")
        assert second.message == f"rank 0: {first.message}"
        assert "the SGLang server ended before it was ready; the end of " in first.message
        assert "unrecognized arguments: --no-such-argument 7" in first.message
        _assert_no_child_is_left(ranks)


def test_a_mistake_of_one_rank_is_an_error_of_every_rank(tmp_path: Path) -> None:
    def arguments(rank: int) -> dict[str, object]:
        return engine_arguments(tmp_path, 2, **({"pp_size": 2} if rank == 1 else {}))

    with verl_ranks(tmp_path) as ranks:
        first, second = make_all(ranks, arguments)
        assert (first.kind, second.kind) == ("ValueError", "ValueError")
        assert first.message == f"rank 1: {second.message}"
        assert "pp_size=2: every pipeline stage" in second.message
        _assert_no_child_is_left(ranks)


def _assert_no_child_is_left(ranks: list[VerlRank]) -> None:
    assert [psutil.Process(rank.process.pid).children() for rank in ranks] == [[], []]


def test_torchruns_environment_is_enough(tmp_path: Path) -> None:
    where = {"sidecar": f"unix:{tmp_path / 's.sock'}", "port": free_port(), "log_dir": str(tmp_path / "logs")}
    arguments = json.dumps(engine_arguments(tmp_path, 2, **where))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, *torchrun, "-m", "tests.e2e.verl_torchrun", str(tmp_path), arguments]
    output = tmp_path / "output"
    with output.open("w") as file:  # no pipe: torch_shm_manager inherits it
        ran = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=250, check=False)
    assert ran.returncode == 0, output.read_text()
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert (first["rank"], second["rank"], first["size"]) == (0, 1, 2)
    assert first["versions"] == second["versions"] == ["1", "2"]
    assert first["tokens"] == second["tokens"]
    assert first["tokens"][0] != first["tokens"][1]
