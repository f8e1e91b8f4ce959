"""The command line as a person or a supervisor meets it."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from sidecar import __version__
from sidecar.cli import EXIT_CANNOT_START, EXIT_NOT_HEALTHY, EXIT_USAGE, REEXECUTED, main
from sidecar.listening import _lock
from sidecar.settings import SETTINGS

ENGINE = "http://127.0.0.1:9"


def sidecar(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sidecar", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here torch may be imported, and ``main`` would replace the test's process."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no-command"),
        pytest.param(["dance"], id="unknown-command"),
        pytest.param(["status", "--target", "x", "--timeout", "soon"], id="timeout-in-words"),
    ],
)
@pytest.mark.usefixtures("light")
def test_wrong_usage_exits_with_2_and_says_how_it_is_used(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == EXIT_USAGE
    assert "usage: sglang-weight-sync" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine_url", "listen", "more", "said"),
    [
        (ENGINE, "0.0.0.0:50051", [], "is not a loopback address: it needs TLS (--tls-certificate, --tls-key), and"),
        (ENGINE, "node0:50051", [], "or say --insecure if every host that reaches it may change the weights"),
        (ENGINE, "127.0.0.1:0", ["--gpu-uuids", "0,1"], "--gpu-uuids: '0' is not a GPU's UUID; list them as"),
        (ENGINE, "nonsense", [], "is neither unix:/path.sock nor host:port"),
        (ENGINE, "unix:/nowhere/s.sock", [], "the folder does not exist"),
        ("localhost:30000", "127.0.0.1:0", [], "--engine-url 'localhost:30000' is not of the form"),
        (ENGINE, "127.0.0.1:0", ["--load-timeout", "0"], "timeout load must be more than 0 s"),
    ],
)
@pytest.mark.usefixtures("light")
def test_settings_that_cannot_work_exit_with_2_and_one_sentence(
    engine_url: str, listen: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--engine-url", engine_url, "--listen", listen, *more]) == EXIT_USAGE
    errors = capsys.readouterr().err
    assert errors.startswith("sglang-weight-sync: ")
    assert said in errors
    assert errors.count("\n") == 1


def test_an_address_that_is_taken_exits_with_3_and_names_it(tmp_path: Path) -> None:
    _lock(tmp_path / "s.sock")
    done = sidecar("serve", "--engine-url", ENGINE, "--listen", f"unix:{tmp_path}/s.sock")
    assert done.returncode == EXIT_CANNOT_START
    said = f"another sidecar serves unix:{tmp_path}/s.sock; give this one another socket"
    assert done.stderr.splitlines()[-1] == f"sglang-weight-sync: {said}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["health"], ["health", "--liveness"], ["status"]])
@pytest.mark.usefixtures("light")
def test_asking_where_nobody_answers_exits_with_1_within_its_timeout(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert main([*command, "--target", f"unix:{tmp_path}/s.sock", "--timeout", "1"]) == EXIT_NOT_HEALTHY
    assert time.monotonic() - started < 5
    said = capsys.readouterr().out
    assert f"the sidecar at unix:{tmp_path}/s.sock does not answer" in said
    assert said.rstrip().endswith("is it running?")


def test_the_version_is_the_packages() -> None:
    assert sidecar("--version").stdout.strip() == __version__


@pytest.mark.usefixtures("light")
def test_every_option_of_serve_is_known_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = capsys.readouterr().out
    for setting in SETTINGS:
        assert setting.flag in said


@pytest.mark.parametrize(
    ("arguments", "loaded", "already", "replaced"),
    [
        (["serve", "--help"], True, False, True),
        (["serve", "--help"], True, True, False),
        (["serve", "--help"], False, False, False),
        (["--version"], True, False, False),
        (["health", "--help"], True, False, False),
    ],
)
def test_only_serve_replaces_a_process_with_torch_in_it_and_only_once(
    arguments: list[str], loaded: bool, already: bool, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(Exception):
        """Instead of a new process."""

    def execve(_program: str, command: list[str], environment: dict[str, str]) -> None:
        assert command[1:] == ["-m", "sidecar", *arguments]
        assert REEXECUTED in environment
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv(REEXECUTED, raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    if already:
        monkeypatch.setenv(REEXECUTED, "1")
    with pytest.raises(Replaced if replaced else SystemExit):
        main(arguments)
