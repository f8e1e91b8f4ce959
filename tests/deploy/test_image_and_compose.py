"""The Dockerfile and the compose file."""

import json
import re
from typing import Any

import pytest
from compose_spec import PyCompose

from tests.deploy.files import DEPLOY, DRAIN_S, PROBE_PORT, document, run, tool

DOCKERFILE = DEPLOY / "docker/Dockerfile"
RANKS = ["engine", "sidecar", "trainer"]


def services() -> Any:
    return document("compose/compose.yaml")["services"]


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    done = run([tool("hadolint"), "--no-color", DOCKERFILE])
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_image_runs_as_a_number_and_ends_in_the_command_line() -> None:
    last_stage = DOCKERFILE.read_text().rsplit("\nFROM ", 1)[1]
    assert "\nUSER 10001:10001\n" in last_stage
    assert '\nENTRYPOINT ["sglang-weight-sync"]\n' in last_stage
    assert "\nHEALTHCHECK " in last_stage
    assert "pip" not in last_stage
    assert "apt" not in last_stage


def test_what_is_sent_to_the_build_is_what_the_dockerfile_copies() -> None:
    lines = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines()
    ignored = [line for line in lines if not line.startswith("#")]
    assert ignored[0] == "*"
    copied = [
        word
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)


def test_the_compose_specification_accepts_the_file() -> None:
    # YAML's merge keys are undone by the parser: compose understands them, the specification's model does not.
    text = json.dumps(document("compose/compose.yaml"))
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)  # what stands for a variable that is not set
    compose = PyCompose.from_json(re.sub(r"\$\{\w+:\?[^}]*\}", "/srv/model", text))
    compose.validate()
    assert sorted(compose.service_names()) == sorted(services())


@pytest.mark.parametrize("name", list(services()))
def test_a_service_runs_closed(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    alone = name == "copy-loader" and service["network_mode"] == "none"
    assert service["user"] == ("0:0" if alone else "10001:10001")


def test_engine_sidecar_and_trainer_live_in_the_namespaces_of_one_that_is_never_updated() -> None:
    for name in RANKS:
        kinds = [services()[name][kind] for kind in ("network_mode", "ipc", "pid")]
        assert kinds == ["service:pod"] * 3
    assert services()["pod"]["ipc"] == "shareable"
    assert services()["engine"]["deploy"] == services()["trainer"]["deploy"]
    assert "deploy" not in services()["sidecar"]


def test_nothing_is_published_but_on_loopback() -> None:
    assert services()["pod"]["ports"] == ["127.0.0.1:30000:30000", f"127.0.0.1:{PROBE_PORT}:{PROBE_PORT}"]
    assert not any("ports" in services()[name] for name in RANKS)


def test_the_sidecar_is_stopped_before_its_engine_and_has_longer_than_its_drain() -> None:
    assert "engine" in services()["sidecar"]["depends_on"]
    assert int(services()["sidecar"]["environment"]["SGLANG_WEIGHT_SYNC_DRAIN_TIMEOUT"]) == DRAIN_S
    assert int(services()["sidecar"]["stop_grace_period"].removesuffix("s")) > DRAIN_S


def test_keys_are_secrets_that_are_files() -> None:
    declared = document("compose/compose.yaml")["secrets"]
    assert all(one.keys() == {"file"} for one in declared.values())
    used = {value for key, value in services()["sidecar"]["environment"].items() if key.endswith("KEY_FILE")}
    assert used == {f"/run/secrets/{name}" for name in services()["sidecar"]["secrets"]}
    assert f"/run/secrets/{services()['engine']['secrets'][0]}" in services()["engine"]["command"]
