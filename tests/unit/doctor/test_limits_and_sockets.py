"""Faults planted in limits, addresses, proxies and the report itself."""

from __future__ import annotations

import fcntl
import json
import socket
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.doctor import limits, network, report, sockets
from sidecar.doctor.finding import Check, Finding, Verdict, fail, ok, warn
from sidecar.doctor.situation import Situation
from sidecar.doctor.threads import in_thread
from tests.unit.doctor.hosts import ENGINE, Planted, assert_found, only, seen_engine

MIB = 1 << 10
"""In blocks of the planted file system."""


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path / "host")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One where a sidecar may listen."""
    made = tmp_path / "private"
    made.mkdir(mode=0o700)
    return made


@pytest.mark.parametrize(
    ("device", "free", "verdict", "reason"),
    [
        ("cuda", 7 * MIB, Verdict.FAIL, "2 ranks need 8 MiB at least"),
        ("cpu", 64 * MIB, Verdict.FAIL, "2 ranks need 128 MiB at least"),
        ("cpu", 4096 * MIB, Verdict.WARN, "2 ranks stage up to 8192 MiB there"),
    ],
)
def test_a_dev_shm_that_is_full_or_too_small_is_found(
    planted: Planted, device: str, free: int, verdict: Verdict, reason: str
) -> None:
    planted.shm = (8192 * MIB, free)
    assert_found(only(limits.shm_space(planted.situation(device)), Check.SHM_SPACE), verdict, reason, "--shm-size")


def test_a_dev_shm_where_nothing_can_be_made_is_found(planted: Planted) -> None:
    (planted.root / "dev/shm").rmdir()
    found = only(limits.shm_space(planted.situation()), Check.SHM_SPACE)
    assert_found(found, Verdict.FAIL, "cannot make files in /dev/shm", "mount a tmpfs")


def test_trying_dev_shm_leaves_nothing_there(planted: Planted) -> None:
    assert only(limits.shm_space(planted.situation()), Check.SHM_SPACE).verdict is Verdict.OK
    assert list((planted.root / "dev/shm").iterdir()) == []


@pytest.mark.parametrize(("allowed", "verdict"), [(79, Verdict.FAIL), (80, Verdict.WARN), (1024, Verdict.OK)])
def test_a_low_limit_of_open_files_is_found(planted: Planted, allowed: int, verdict: Verdict) -> None:
    planted.open_files = allowed
    found = only(limits.open_files(planted.situation()), Check.OPEN_FILES)
    assert_found(found, verdict, f"this process may open {allowed} files", "" if verdict is Verdict.OK else "ulimit -n")


def test_a_low_limit_of_the_engine_is_found(planted: Planted) -> None:
    (planted.root / "proc" / ENGINE / "limits").write_text("Max open files            32       4096      files\n")
    found = only(limits.open_files(planted.situation()), Check.OPEN_FILES)
    assert_found(found, Verdict.FAIL, "the engine's process may open 32 files", "--ulimit nofile")


def test_a_manifest_is_estimated_from_the_engines_checkpoint(planted: Planted, tmp_path: Path) -> None:
    header = json.dumps({f"layer.{number}": _tensor(number) for number in range(100)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(400))
    engine = seen_engine({"model_path": str(tmp_path)})
    situation = Situation(planted.situation().options, planted.host(), engine)
    found = only(limits.manifest(situation), Check.MANIFEST)
    assert_found(found, Verdict.OK, "100 tensors make a manifest of about 5 KiB of 64 MiB", "")


def _tensor(number: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [4 * number, 4 * number + 4]}


def test_a_private_folder_is_where_a_sidecar_can_listen(planted: Planted, folder: Path) -> None:
    found = only(sockets.listen(planted.situation(listen=f"unix:{folder}/s.sock")), Check.LISTEN)
    assert_found(found, Verdict.OK, "a sidecar can serve at unix:", "")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "reason"), [("/x" * 54, "longer than the 107 bytes"), ("/nowhere/s.sock", "the folder does not exist")]
)
def test_a_socket_path_that_cannot_be_is_found(planted: Planted, path: str, reason: str) -> None:
    found = only(sockets.listen(planted.situation(listen=f"unix:{path}")), Check.LISTEN)
    assert_found(found, Verdict.FAIL, reason, "/run/weight-sync/sidecar.sock")


def test_a_folder_that_others_may_enter_is_found(planted: Planted, folder: Path) -> None:
    folder.chmod(0o755)
    found = only(sockets.listen(planted.situation(listen=f"unix:{folder}/s.sock")), Check.LISTEN)
    assert_found(found, Verdict.WARN, "other users may enter", "mkdir -m 700")


def test_what_is_no_socket_is_found(planted: Planted, folder: Path) -> None:
    (folder / "s.sock").mkdir()
    found = only(sockets.listen(planted.situation(listen=f"unix:{folder}/s.sock")), Check.LISTEN)
    assert_found(found, Verdict.FAIL, "is no socket", "a path of its own")


def test_another_programs_socket_is_found_and_a_dead_ones_is_not(planted: Planted, folder: Path) -> None:
    situation = planted.situation(listen=f"unix:{folder}/s.sock")
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(f"{folder}/s.sock")
        server.listen()
        assert_found(
            only(sockets.listen(situation), Check.LISTEN), Verdict.FAIL, "another process serves", "stop the one"
        )
    assert only(sockets.listen(situation), Check.LISTEN).verdict is Verdict.OK


def test_a_sidecar_that_has_the_lock_but_does_not_listen_yet_is_found(planted: Planted, folder: Path) -> None:
    situation = planted.situation(listen=f"unix:{folder}/s.sock")
    with (folder / "s.sock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_found(
            only(sockets.listen(situation), Check.LISTEN), Verdict.FAIL, "another process serves", "stop the one"
        )
    assert only(sockets.listen(situation), Check.LISTEN).verdict is Verdict.OK


async def test_a_look_that_hangs_does_not_keep_the_process_alive() -> None:
    end = threading.Event()
    with pytest.raises(TimeoutError):
        await in_thread(end.wait, 0.05)
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "doctor"] == [True]
    end.set()


def test_a_port_that_is_taken_is_found(planted: Planted) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        found = only(sockets.listen(planted.situation(listen=where)), Check.LISTEN)
        assert_found(found, Verdict.FAIL, f"nothing can listen at {where}", "another --listen")
    assert only(sockets.listen(planted.situation(listen=where)), Check.LISTEN).verdict is Verdict.OK


def test_an_address_that_other_hosts_reach_is_warned_of(planted: Planted) -> None:
    found = only(sockets.listen(planted.situation(listen="0.0.0.0:0")), Check.LISTEN)
    assert_found(found, Verdict.WARN, "other hosts reach 0.0.0.0:0", "TLS")


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_that_takes_calls_to_the_engine_is_found_without_its_password(planted: Planted, name: str) -> None:
    planted.environ |= {name: "http://user:hidden@proxy:3128", "NO_PROXY": "example.com,10.0.0.0/8"}
    found = only(network.proxies(planted.situation()), Check.PROXIES)
    assert_found(found, Verdict.WARN, f"{name} is set", "add 127.0.0.1 to no_proxy")
    assert "hidden" not in found.reason + found.fix


@pytest.mark.parametrize("exempt", ["*", "127.0.0.1", "a.example, 127.0.0.0/8", "localhost,127.0.0.1"])
def test_a_proxy_that_leaves_the_engine_out_is_none(planted: Planted, exempt: str) -> None:
    planted.environ |= {"http_proxy": "http://proxy:3128", "no_proxy": exempt}
    assert only(network.proxies(planted.situation()), Check.PROXIES).verdict is Verdict.OK


@pytest.mark.parametrize("entry", ["example.com", ".example.com", "*.example.com", "GPU1.example.com"])
def test_names_are_exempt_by_their_endings(planted: Planted, entry: str) -> None:
    planted.environ |= {"http_proxy": "http://proxy:3128", "no_proxy": entry}
    for host, verdict in (("gpu1.example.com", Verdict.OK), ("gpu1.other-example.com", Verdict.WARN)):
        found = only(network.proxies(planted.situation(engine_url=f"http://{host}:1")), Check.PROXIES)
        assert found.verdict is verdict


@pytest.mark.parametrize(
    ("skew_s", "verdict", "reason"),
    [
        (60.0, Verdict.WARN, "60 s ahead of this one"),
        (-60.0, Verdict.WARN, "60 s behind this one"),
        (4.9, Verdict.OK, "agrees"),
        (None, Verdict.SKIPPED, "does not say"),
    ],
)
def test_a_clock_that_is_wrong_is_found(planted: Planted, skew_s: float | None, verdict: Verdict, reason: str) -> None:
    situation = planted.situation()
    found = network.clock(replace(situation, engine=replace(situation.engine, skew_s=skew_s)))
    assert_found(only(found, Check.CLOCK), verdict, reason, "time server" if verdict is Verdict.WARN else "")


FINDINGS = [
    ok(Check.ENGINE, "it answers"),
    warn(Check.CLOCK, "it is late", "set it"),
    fail(Check.LISTEN, "long " * 40, "move"),
]


def test_the_text_is_aligned_with_each_fix_below_its_reason_and_a_count_at_the_end() -> None:
    lines = report.as_text(FINDINGS).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert [line.index(word) for line, word in zip(lines, ("it answers", "it is late", "-> set it"), strict=False)] == [
        len(report.INDENT)
    ] * 3
    assert lines[-1] == "1 ok, 1 warn, 1 fail"


@pytest.mark.parametrize(("number", "verdict"), [(1, "ok"), (2, "warn"), (3, "fail")])
def test_the_json_says_the_worst_and_every_finding(number: int, verdict: str) -> None:
    said = json.loads(report.as_json(FINDINGS[:number]))
    assert said["verdict"] == verdict
    assert [Finding(Check(one.pop("check")), Verdict(one.pop("verdict")), **one) for one in said["findings"]] == (
        FINDINGS[:number]
    )
