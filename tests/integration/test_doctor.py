"""The doctor beside scripted engines, over real sockets: faults of the engine, and all checks together."""

from __future__ import annotations

import argparse
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.doctor.command import ADMIN_KEY, API_KEY, EXIT_FAIL, EXIT_USAGE, add_arguments, main
from sidecar.doctor.finding import Check, Finding, Verdict
from sidecar.doctor.host import Host
from sidecar.doctor.run import examine
from sidecar.doctor.situation import DoctorOptions
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import Fault, ScriptedEngine
from tests.fakes.calls import Reply, json_reply, text_reply
from tests.fakes.http_frontend import HttpFrontend
from tests.integration.conftest import StartPair
from tests.unit.doctor.hosts import OTHER_PIDS, Planted, assert_found, only

API, ADMIN = "the-api-key-5521", "the-admin-key-9913"
PROBE = "/update_weight_version"
ME = str(os.getpid())
"""The scripted engine runs in this process."""


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path / "host", engine_pid=ME)


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(tp_size=2, device="cuda") as started:
        yield started


async def find(planted: Planted, url: str, **options: object) -> list[Finding]:
    asked = DoctorOptions(**{"engine_url": url, **options})  # type: ignore[arg-type]
    return await examine(asked, planted.host())


def run(url: str, *arguments: str, host: Host | None = None) -> int:
    """The command, as ``cli`` calls it."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(["--engine-url", url, *arguments]), host)


def failed(findings: list[Finding]) -> list[Check]:
    return [finding.check for finding in findings if finding.verdict is Verdict.FAIL]


@pytest.mark.parametrize("release", ["0.5.15.post1", "0.5.20", "0.5.23"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
async def test_a_healthy_host_has_neither_failures_nor_warnings(planted: Planted, release: str, device: str) -> None:
    with ScriptedEngine(release, 2, device=device) as engine:
        findings = await find(planted, engine.url, ranks=2)
    assert [finding for finding in findings if finding.verdict in (Verdict.FAIL, Verdict.WARN)] == []
    assert [finding.check for finding in findings] == list(Check)
    assert f"SGLang {release}" in only(findings, Check.RELEASE).reason


async def test_the_engine_is_left_as_it_was(planted: Planted, engine: ScriptedEngine) -> None:
    engine.running_requests = 3
    await find(planted, engine.url, ranks=2)
    assert engine.paths() == [PROBE], "one call, which it refuses for its body"
    assert (engine.weight_version, engine.paused, engine.session_open) == ("default", False, False)
    assert (engine.running_requests, engine.aborted_requests) == (3, 0)


async def test_an_engine_that_is_down_is_found(planted: Planted, engine: ScriptedEngine) -> None:
    engine.die()
    findings = await find(planted, engine.url)
    assert_found(only(findings, Check.ENGINE), Verdict.FAIL, "connection refused", "start the SGLang server")
    for check in (Check.KEYS, Check.RELEASE, Check.RANKS, Check.GPUS):
        assert only(findings, check).verdict is Verdict.SKIPPED


@pytest.mark.parametrize(
    "reply",
    [text_reply(404, "Not Found"), text_reply(200, "<html>"), json_reply(200, {"tp_size": 1}), json_reply(200, [])],
    ids=["not-found", "a-page", "another-object", "a-list"],
)
async def test_a_server_that_is_not_sglang_is_found(planted: Planted, reply: Reply) -> None:
    with closing(HttpFrontend(lambda _: reply)) as other:
        findings = await find(planted, f"http://127.0.0.1:{other.port}")
    assert_found(only(findings, Check.ENGINE), Verdict.FAIL, "is not SGLang", "name the SGLang server itself")
    assert only(findings, Check.KEYS).verdict is Verdict.SKIPPED


async def test_a_port_that_never_answers_is_found_in_time(planted: Planted) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        began = time.monotonic()
        findings = await find(planted, f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.2)
    assert_found(only(findings, Check.ENGINE), Verdict.FAIL, "no answer within 0.2 s", "look at the server's log")
    assert time.monotonic() - began < 5.0


async def test_a_server_that_has_not_started_is_told_from_another_program(planted: Planted) -> None:
    with closing(HttpFrontend(lambda _: text_reply(503, "Service Unavailable"))) as starting:
        found = only(await find(planted, f"http://127.0.0.1:{starting.port}"), Check.ENGINE)
    assert_found(found, Verdict.FAIL, "answered 503 to /server_info", "wait until the server has started")


async def test_an_engine_that_hangs_is_found(planted: Planted, engine: ScriptedEngine) -> None:
    engine.fault("/server_info", Fault.HANG)
    findings = await find(planted, engine.url, timeout_s=0.2)
    assert_found(only(findings, Check.ENGINE), Verdict.FAIL, "no answer within 0.2 s", "--timeout gives it longer")


@pytest.mark.parametrize(
    ("given", "route", "fix"),
    [
        ({}, "/server_info: the key was not given", "--engine-api-key-file"),
        ({"api_key": "wrong"}, "/server_info: the key is not the one", "--engine-api-key-file"),
        ({"api_key": API}, f"{PROBE}: the key is not the one", "--engine-admin-key-file"),
        ({"api_key": API, "admin_key": "wrong"}, f"{PROBE}: the key is not the one", "--engine-admin-key-file"),
        ({"admin_key": ADMIN}, "/server_info: the key was not given", "--engine-api-key-file"),
    ],
)
async def test_a_key_that_is_missing_or_wrong_is_found(
    planted: Planted, given: dict[str, object], route: str, fix: str
) -> None:
    with ScriptedEngine(tp_size=2, device="cuda", api_key=API, admin_api_key=ADMIN) as engine:
        findings = await find(planted, engine.url, **given)
        assert engine.weight_version == "default"
    assert_found(only(findings, Check.KEYS), Verdict.FAIL, f"the engine refuses {route}", fix)


async def test_an_admin_key_alone_is_missed_at_the_control_routes(planted: Planted) -> None:
    with ScriptedEngine(tp_size=2, device="cuda", admin_api_key=ADMIN) as engine:
        findings = await find(planted, engine.url)
    assert_found(only(findings, Check.KEYS), Verdict.FAIL, f"{PROBE}: the key was not given", "--engine-admin-key-file")
    assert only(findings, Check.ENGINE).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("of_the_engine", "given"),
    [
        ({"api_key": API, "admin_api_key": ADMIN}, {"api_key": API, "admin_key": ADMIN}),
        ({"api_key": API}, {"api_key": API}),
        ({"admin_api_key": ADMIN}, {"admin_key": ADMIN}),
    ],
)
async def test_the_right_keys_are_taken(
    planted: Planted, of_the_engine: dict[str, str], given: dict[str, object]
) -> None:
    with ScriptedEngine(tp_size=2, device="cuda", **of_the_engine) as engine:  # type: ignore[arg-type]
        findings = await find(planted, engine.url, **given)
        assert engine.weight_version == "default"
    assert only(findings, Check.KEYS).verdict is Verdict.OK
    assert failed(findings) == []


async def test_another_number_of_ranks_is_found(planted: Planted, engine: ScriptedEngine) -> None:
    found = only(await find(planted, engine.url, ranks=4), Check.RANKS)
    assert_found(found, Verdict.FAIL, "the trainer has 4 TP ranks, the engine tp_size 2", "--tp-size 4")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"pp_size": 2}, "pipeline parallelism"),
        ({"dp_size": 2}, "data-parallel replicas"),
        ({"quantization": "fp8"}, "quantization 'fp8'"),
        ({"weight_cache_mode": "on"}, "--weight-cache-mode is on"),
    ],
)
async def test_an_engine_that_cannot_be_updated_is_found(
    planted: Planted, settings: dict[str, object], reason: str
) -> None:
    with ScriptedEngine(tp_size=2, device="cuda", server_info=settings) as engine:
        found = only(await find(planted, engine.url), Check.RELEASE)
    assert_found(found, Verdict.FAIL, reason, "docs/engine.md")


async def test_a_release_that_is_too_old_is_found(planted: Planted) -> None:
    with ScriptedEngine(tp_size=2, device="cuda", server_info={"version": "0.5.14"}) as engine:
        found = only(await find(planted, engine.url), Check.RELEASE)
    assert_found(found, Verdict.FAIL, "0.5.14 is older than", "run SGLang 0.5.15.post1 or later")


async def test_a_memory_saver_is_named(planted: Planted) -> None:
    with ScriptedEngine(tp_size=2, device="cuda", server_info={"enable_memory_saver": True}) as engine:
        found = only(await find(planted, engine.url), Check.MEMORY_SAVER)
    assert_found(found, Verdict.OK, "resume the tag 'weights' before each update", "")


@pytest.mark.parametrize(("ahead_s", "said"), [(60.0, "behind"), (-60.0, "ahead of")])
async def test_a_clock_that_is_wrong_is_found_by_the_answers_date(
    planted: Planted, engine: ScriptedEngine, ahead_s: float, said: str
) -> None:
    planted.ahead_s = ahead_s
    found = only(await find(planted, engine.url), Check.CLOCK)
    assert_found(found, Verdict.WARN, said, "one time server")


async def test_several_faults_are_all_found_at_once(planted: Planted) -> None:
    planted.pid_namespace(ME, OTHER_PIDS)
    planted.another_view("dev/shm", "tmp")
    planted.status(ME, uid=2000)
    planted.open_files = 32
    planted.shm = (1024, 0)
    with ScriptedEngine(tp_size=2, device="cuda", server_info={"pp_size": 2}) as engine:
        findings = await find(planted, engine.url, ranks=8)
    assert failed(findings) == [
        Check.RELEASE,
        Check.RANKS,
        Check.USER,
        Check.PID_NAMESPACE,
        Check.SHM_VIEW,
        Check.SHM_SPACE,
        Check.OPEN_FILES,
    ]
    assert all(finding.fix for finding in findings if finding.verdict is Verdict.FAIL)


async def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(planted: Planted, engine: ScriptedEngine) -> None:
    def broken(_path: object) -> os.statvfs_result:
        raise RuntimeError(f"no such thing, {API}")

    asked = DoctorOptions(engine_url=engine.url, api_key=API)
    findings = await examine(asked, replace(planted.host(), statvfs=broken))
    found = only(findings, Check.SHM_SPACE)
    assert_found(found, Verdict.FAIL, "the check itself broke: RuntimeError: no such thing, ***", "report this")
    assert failed(findings) == [Check.SHM_SPACE]


async def test_a_check_that_hangs_is_a_finding_and_the_others_go_on(planted: Planted, engine: ScriptedEngine) -> None:
    end = threading.Event()

    def hangs(_path: object) -> os.statvfs_result:
        end.wait()
        raise AssertionError("nobody waits for this")

    asked = DoctorOptions(engine_url=engine.url, timeout_s=1.5)
    findings = await examine(asked, replace(planted.host(), statvfs=hangs))
    end.set()
    assert_found(only(findings, Check.SHM_SPACE), Verdict.FAIL, "did not end within 1.5 s", "hangs")
    assert failed(findings) == [Check.SHM_SPACE]


async def test_a_look_at_the_engine_that_breaks_is_a_finding_too(planted: Planted, engine: ScriptedEngine) -> None:
    def broken(_url: str) -> str:
        raise RuntimeError("no /proc")

    findings = await examine(DoctorOptions(engine_url=engine.url), replace(planted.host(), listener=broken))
    assert_found(only(findings, Check.ENGINE), Verdict.FAIL, "the check itself broke", "report this")


async def test_a_socket_taken_by_a_live_sidecar_is_found_and_the_sidecar_answers(
    planted: Planted, start: StartPair
) -> None:
    pair = start()
    findings = await find(planted, pair.engine.url, listen=pair.target, target=pair.target, timeout_s=20.0)
    assert_found(only(findings, Check.LISTEN), Verdict.FAIL, "another process serves at unix:", "another --listen")
    assert only(findings, Check.TARGET).verdict is Verdict.OK
    assert pair.status().current_update.update_id == ""


async def test_a_sidecar_that_is_not_there_is_found(planted: Planted, engine: ScriptedEngine, tmp_path: Path) -> None:
    found = only(await find(planted, engine.url, target=f"unix:{tmp_path}/none.sock"), Check.TARGET)
    assert_found(found, Verdict.FAIL, "does not answer", "sglang-weight-sync serve")


async def test_a_sidecar_whose_engine_is_gone_is_warned_of(planted: Planted, start: StartPair) -> None:
    pair = start()
    pair.engine.die()
    pair.wait_for(pb.SIDECAR_STATE_ENGINE_UNREACHABLE)
    found = only(await find(planted, pair.engine.url, target=pair.target, timeout_s=20.0), Check.TARGET)
    assert_found(found, Verdict.WARN, "is not ready", "sglang-weight-sync status")


def test_the_command_finds_this_very_process_as_the_engines(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    run(engine.url, "--json", "--ranks", "2")
    said = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert said["process"]["reason"].startswith(f"process {ME} listens")
    for check in ("engine", "keys", "release", "ranks", "process", "user", "pid_namespace", "shm_view", "clock"):
        assert said[check]["verdict"] == "ok", said[check]


def test_the_command_exits_with_1_if_anything_fails_and_says_what_to_do(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(engine.url, "--ranks", "3") == EXIT_FAIL
    out = capsys.readouterr().out
    assert "fail     ranks" in out
    assert "-> start the engine with --tp-size 3" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "0"],
        ["--timeout", "0"],
        ["--gpu-uuids", "0,1"],
        ["--engine-api-key-file", "/nowhere/key"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("http://127.0.0.1:9", *arguments) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("sglang-weight-sync: ")


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("right", [True, False])
def test_no_key_is_in_any_output(
    planted: Planted, form: list[str], right: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {"api": API, "admin": ADMIN if right else "a-wrong-key-7743"}
    files = [f"--engine-{name}-key-file={tmp_path / name}" for name in keys]
    for name, key in keys.items():
        (tmp_path / name).write_text(key + "\n")
    with ScriptedEngine(tp_size=2, device="cuda", api_key=API, admin_api_key=ADMIN) as engine:
        code = run(engine.url, *files, *form, host=planted.host())
    printed = "".join(capfd.readouterr())
    assert ("takes the keys given" in printed, code == EXIT_FAIL) == (right, not right)
    for secret in (*keys.values(), ADMIN):
        assert secret not in printed


def test_keys_from_the_environment_are_used(planted: Planted, capfd: pytest.CaptureFixture[str]) -> None:
    planted.environ |= {API_KEY: API, ADMIN_KEY: ADMIN}
    with ScriptedEngine(tp_size=2, device="cuda", api_key=API, admin_api_key=ADMIN) as engine:
        assert run(engine.url, host=planted.host()) == 0
    printed = "".join(capfd.readouterr())
    assert "takes the keys given" in printed
    assert API not in printed
    assert ADMIN not in printed
