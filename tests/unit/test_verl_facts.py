"""What the ranks tell each other of the engine."""

import json
import os
from pathlib import Path

import pytest

from adapter.errors import LaunchError
from adapter.launch import ProcessFacts
from adapter.launch.reaper import process_state
from adapter.verl_engine.facts import EngineFacts, Ready, facts_of_all, largest_version, memory_facts
from sidecar.v1 import weight_sync_pb2 as pb


def process(name: str, log: Path, *, alive: bool = True) -> ProcessFacts:
    state = process_state(os.getpid())
    assert state is not None
    return ProcessFacts(name, os.getpid(), state.started - (not alive), str(log), 0)


def ready(host: str, *processes: ProcessFacts, engine: EngineFacts | None = None) -> Ready:
    told = json.dumps(Ready(host=host, processes=processes, engine=engine).to_json())
    return Ready.from_json(json.loads(told))


def test_rank_0s_word_and_everybodys_processes_reach_all(tmp_path: Path) -> None:
    engine = EngineFacts(sidecar="unix:/s", server_url="http://h:1", last_version=3, keeps_weights=True)
    server, sidecar, other = (process(name, tmp_path / name) for name in ("server", "sidecar", "server"))
    facts = facts_of_all([ready("a", server, sidecar, engine=engine), ready("b"), ready("b", other)])
    assert (facts.sidecar, facts.server_url, facts.last_version, facts.keeps_weights) == (
        "unix:/s",
        "http://h:1",
        3,
        True,
    )
    assert facts.processes == {"a": [server, sidecar], "b": [other]}
    assert facts.log_of("sidecar") == str(tmp_path / "sidecar")
    assert facts.log_of("nothing") is None


def test_a_death_is_seen_on_its_own_host_alone(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("out of memory\n")
    dead = process("the server", tmp_path / "log", alive=False)
    facts = EngineFacts(sidecar="unix:/s", processes={"a": [process("x", tmp_path / "x")], "b": [dead]})
    facts.check_alive("a")
    facts.check_alive("c")
    with pytest.raises(LaunchError, match=rf"^the server has ended; the end of {tmp_path}/log:\nout of memory$"):
        facts.check_alive("b")


def test_versions_count_on_from_the_largest_decimal_one() -> None:
    def status(served: str, last: str = "", current: str = "") -> pb.GetStatusResponse:
        return pb.GetStatusResponse(
            weight_version=served,
            last_update=pb.UpdateOutcome(weight_version=last),
            current_update=pb.UpdateOutcome(weight_version=current),
        )

    assert largest_version(pb.GetStatusResponse()) == 0
    assert largest_version(status("default")) == 0
    assert largest_version(status("7", "9", "8")) == 9
    assert largest_version(status("", "v3", "12")) == 12


@pytest.mark.parametrize(("state", "expected"), [("COLLECTING", 7), ("APPLYING", 8)])
def test_a_version_counts_once_its_update_waits_for_no_rank_any_more(state: str, expected: int) -> None:
    current = pb.UpdateOutcome(weight_version="8", state=pb.UpdateState.Value(f"UPDATE_STATE_{state}"))
    assert largest_version(pb.GetStatusResponse(weight_version="7", current_update=current)) == expected


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, (False, True)),
        ({"enable_memory_saver": True}, (True, False)),
        ({"enable_memory_saver": True, "enable_weights_cpu_backup": True}, (True, True)),
    ],
)
def test_weights_are_lost_only_where_they_are_freed_without_a_backup(
    info: dict[str, bool], expected: tuple[bool, bool]
) -> None:
    assert memory_facts(info) == expected
