"""Settings come from flags, the environment and a file, in that order; what is unknown or unreadable is an error."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from sidecar import settings
from sidecar.secret import Secret
from tests.docs_table import PAGE, with_table

PREFIX = settings.PREFIX


def resolved(*argv: str, **environ: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    return settings.resolve(parser.parse_args(argv), {PREFIX + name: value for name, value in environ.items()})


def toml(folder: Path, text: str) -> str:
    path = folder / "sidecar.toml"
    path.write_text(text)
    return str(path)


def test_a_flag_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    config = toml(tmp_path, 'engine_url = "http://file:1"\nload_timeout = 1\nflush_timeout = 2.5\nreplay = false\n')
    values = resolved("--config", config, "--engine-url", "http://flag:1", ENGINE_URL="http://env:1", LOAD_TIMEOUT="7")
    assert (values["engine-url"], values["load-timeout"], values["flush-timeout"]) == ("http://flag:1", 7.0, 2.5)
    assert values["replay"] is False
    assert resolved("--config", config, "--replay")["replay"] is True
    assert resolved(CONFIG=config)["engine-url"] == "http://file:1"


def test_without_anything_there_are_the_defaults() -> None:
    values = resolved()
    for setting in settings.SETTINGS:
        if setting.kind in (settings.Kind.SECONDS, settings.Kind.COUNT, settings.Kind.SWITCH):
            assert values[setting.name] == setting.default


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('engine_ulr = "http://h:1"', "there is no setting 'engine_ulr'; is engine_url meant?"),
        ('engine_api_key = "key-in-the-open"', "there is no setting 'engine_api_key'; is engine_api_key_file meant?"),
        ("load_timeout = true", "load_timeout: True is not a number of seconds"),
        ("replay = 3", "replay: 3 is neither true nor false"),
        ("engine_url = 3", "engine_url must be a text, not 3"),
        ('max_tensors = "many"', "max_tensors: 'many' is not a whole number"),
        ('log_format = "xml"', "log_format: 'xml' is none of text, json"),
        ("engine_url =", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sidecar\.toml") as raised:
        resolved("--config", toml(tmp_path, text))
    assert said in str(raised.value)
    assert "key-in-the-open" not in str(raised.value)


@pytest.mark.parametrize("name", ["ENGINE_ULR", "LOAD-TIMEOUT", "SECRET"])
def test_a_variable_that_is_no_setting_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"the environment has {PREFIX}{name}, which is no setting"):
        resolved(**{name: "1"})


@pytest.mark.parametrize(
    ("value", "said"), [("soon", "'soon' is not a number"), ("nan", "not"), ("-1", "not"), ("inf", "not")]
)
def test_seconds_are_a_finite_number(value: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolved("--load-timeout", value)


def test_a_secret_comes_from_a_file_or_the_environment_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    from_file = resolved("--engine-api-key-file", str(tmp_path / "key"))["engine-api-key"]
    from_environ = resolved(ENGINE_API_KEY="from-the-environment")["engine-api-key"]
    assert (from_file.text(), from_environ.text()) == ("from-a-file", "from-the-environment")
    assert repr(from_file) == repr(from_environ) == "Secret(set)"
    assert not resolved()["engine-api-key"]


@pytest.mark.parametrize("content", ["", "two words", "zwölf", "line\nline"])
def test_a_secret_that_no_header_could_carry_is_refused_unseen(content: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(ValueError, match="secret") as raised:
        Secret(path=tmp_path / "key")
    assert not content or content not in str(raised.value)


def test_a_secret_follows_its_file_and_outlives_it(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("first")
    secret = Secret(path=tmp_path / "key")
    (tmp_path / "next").write_text("second-one")
    (tmp_path / "next").rename(tmp_path / "key")
    assert secret.text() == "second-one"
    (tmp_path / "key").unlink()
    assert secret.text() == "second-one"


def test_the_documented_table_is_the_codes() -> None:
    assert PAGE.read_text() == with_table(PAGE.read_text()), "run `make docs`"


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_secret_is_an_error_since_it_would_leave_a_door_open(text: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(text)
    givens: list[tuple[list[str], dict[str, str]]] = [
        ([], {"UPDATE_TOKEN": text}),
        ([f"--update-token-file={tmp_path}/token"], {}),
        (["--update-token-file="], {}),
        (["--update-clients", ","], {}),
    ]
    for argv, environ in givens:
        with pytest.raises(ValueError, match=r"empty|cannot be read|names nobody"):
            resolved(*argv, **environ)


def test_a_key_given_by_mistake_as_a_files_name_is_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"--engine-api-key-file: the secret's file cannot be read") as raised:
        resolved("--engine-api-key-file", "sk-a-key-by-mistake")
    assert "sk-a-key" not in str(raised.value)


def test_what_kubernetes_sets_beside_a_service_of_that_name_is_no_setting() -> None:
    resolved(SERVICE_HOST="10.0.0.1", SERVICE_PORT="1", PORT="tcp://10.0.0.1:1", PORT_50051_TCP_ADDR="10.0.0.1")
