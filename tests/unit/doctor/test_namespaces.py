"""Faults planted between the trainer's process and the engine's: each is found by name, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.doctor import namespaces
from sidecar.doctor.finding import Check, Verdict
from sidecar.doctor.situation import EngineSeen, Situation
from tests.unit.doctor.hosts import ENGINE, OTHER_PIDS, URL, USER, Planted, assert_found, only

OTHER_USER = 2000


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path / "host")


def test_one_pid_namespace_is_told_by_its_link(planted: Planted) -> None:
    assert only(namespaces.pid_namespace(planted.situation()), Check.PID_NAMESPACE).verdict is Verdict.OK


def test_another_pid_namespace_is_found(planted: Planted) -> None:
    planted.pid_namespace(ENGINE, OTHER_PIDS)
    found = only(namespaces.pid_namespace(planted.situation()), Check.PID_NAMESPACE)
    assert_found(found, Verdict.FAIL, "another PID namespace", "--pid=container:ENGINE")


@pytest.mark.parametrize(("pids", "verdict"), [("4711\t1", Verdict.FAIL), ("4711", Verdict.OK)])
def test_where_the_link_may_not_be_read_the_numbers_of_the_process_tell(
    planted: Planted, pids: str, verdict: Verdict
) -> None:
    (planted.root / "proc" / ENGINE / "ns/pid").unlink()
    planted.status(ENGINE, pids=pids)
    assert only(namespaces.pid_namespace(planted.situation()), Check.PID_NAMESPACE).verdict is verdict


def test_a_port_of_this_user_without_a_process_is_in_another_pid_namespace(planted: Planted) -> None:
    planted.listens(USER)
    situation = planted.situation(seen=False)
    assert only(namespaces.pid_namespace(situation), Check.PID_NAMESPACE).verdict is Verdict.FAIL
    found = only(namespaces.process(situation), Check.PROCESS)
    assert_found(found, Verdict.WARN, "shows no process", "in its PID namespace")


def test_between_cpus_pid_namespaces_do_not_matter(planted: Planted) -> None:
    planted.pid_namespace(ENGINE, OTHER_PIDS)
    assert only(namespaces.pid_namespace(planted.situation("cpu")), Check.PID_NAMESPACE).verdict is Verdict.SKIPPED


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_another_dev_shm_is_found(planted: Planted, device: str) -> None:
    planted.another_view("dev/shm")
    found = only(namespaces.shm_view(planted.situation(device)), Check.SHM_VIEW)
    assert_found(found, Verdict.FAIL, "the engine has another /dev/shm", "--ipc=container:ENGINE")


def test_an_engine_without_dev_shm_is_found(planted: Planted) -> None:
    planted.another_view("tmp")
    found = only(namespaces.shm_view(planted.situation()), Check.SHM_VIEW)
    assert_found(found, Verdict.FAIL, "/dev/shm is not on both sides", "share /dev/shm")


def test_one_dev_shm_in_two_root_folders_is_the_same(planted: Planted) -> None:
    view = planted.another_view("dev")
    (view / "dev/shm").symlink_to(planted.root / "dev/shm")
    assert only(namespaces.shm_view(planted.situation()), Check.SHM_VIEW).verdict is Verdict.OK


def test_another_user_is_found(planted: Planted) -> None:
    planted.status(ENGINE, uid=OTHER_USER)
    found = only(namespaces.user(planted.situation()), Check.USER)
    assert_found(found, Verdict.FAIL, f"user {OTHER_USER}'s, this process user {USER}'s", "as one user")


def test_another_user_is_found_by_the_port_where_the_process_is_not_seen(planted: Planted) -> None:
    planted.listens(OTHER_USER)
    assert only(namespaces.user(planted.situation(seen=False)), Check.USER).verdict is Verdict.FAIL


def test_roots_engine_opens_what_any_user_makes_but_not_the_other_way_round(planted: Planted) -> None:
    planted.status(ENGINE, uid=0)
    assert only(namespaces.user(planted.situation()), Check.USER).verdict is Verdict.OK
    planted.status(ENGINE, uid=USER)
    planted.uid = 0
    assert only(namespaces.user(planted.situation()), Check.USER).verdict is Verdict.FAIL


def test_a_forwarder_is_not_taken_for_the_engine(planted: Planted) -> None:
    (planted.root / "proc" / ENGINE / "comm").write_text("docker-proxy\n")
    planted.listens(USER)
    name = namespaces.forwarder(planted.host(), ENGINE)
    seen = EngineSeen(process=f"{ENGINE}/1", forwarder=name)
    situation = Situation(planted.situation().options, planted.host(), seen)
    found = only(namespaces.process(situation), Check.PROCESS)
    assert_found(found, Verdict.WARN, "docker-proxy listens", "where the server listens itself")
    for look in (namespaces.user, namespaces.pid_namespace, namespaces.shm_view):
        assert [finding.verdict for finding in look(situation)] == [Verdict.SKIPPED]


@pytest.mark.parametrize(
    ("url", "reason"), [(URL, "nobody is seen to listen"), ("http://10.0.0.7:30000", "10.0.0.7 is no loopback address")]
)
def test_an_engine_that_is_not_seen_leaves_its_checks_skipped(planted: Planted, url: str, reason: str) -> None:
    situation = planted.situation(seen=False, engine_url=url)
    assert_found(only(namespaces.process(situation), Check.PROCESS), Verdict.WARN, reason, "on the engine's host")
    for look in (namespaces.user, namespaces.pid_namespace, namespaces.shm_view):
        assert [finding.verdict for finding in look(situation)] == [Verdict.SKIPPED]


def test_an_engine_on_the_cpu_shares_the_temporary_folder(planted: Planted) -> None:
    assert only(namespaces.cpu_sharing(planted.situation("cpu")), Check.CPU_SHARING).verdict is Verdict.OK


def test_another_temporary_folder_is_found(planted: Planted) -> None:
    planted.another_view("tmp")
    found = only(namespaces.cpu_sharing(planted.situation("cpu")), Check.CPU_SHARING)
    assert_found(found, Verdict.FAIL, "the engine has another /tmp", "set TMPDIR in both")


@pytest.mark.parametrize(
    ("folder", "reason"), [("/" + "t" * 90, "a socket's path may have 107 bytes"), ("/nowhere", "cannot write to")]
)
def test_a_temporary_folder_that_torchs_helper_cannot_use_is_found(planted: Planted, folder: str, reason: str) -> None:
    planted.environ["TMPDIR"] = folder
    found = only(namespaces.cpu_sharing(planted.situation("cpu")), Check.CPU_SHARING)
    assert_found(found, Verdict.FAIL, reason, "set TMPDIR")
