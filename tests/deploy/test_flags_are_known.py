"""Every flag, variable and key that deploy/ hands to the sidecar is one of this sidecar's."""

import re
import tomllib
from collections.abc import Iterable
from typing import Any

from tests.deploy.files import DEPLOY, VARIABLE, document, flags, manifest, unit


def named(words: Iterable[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def of_variables(names: Iterable[str]) -> set[str]:
    ours = [name.removeprefix(VARIABLE) for name in names if name.startswith(VARIABLE)]
    assert ours, "none of the sidecar's variables"
    return {f"--{name.lower().replace('_', '-')}" for name in ours}


def sidecar_container() -> Any:
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (found,) = (one for one in pod["initContainers"] if one["name"] == "sidecar")
    return found


def test_the_pods_sidecar_is_started_with_flags_that_it_knows() -> None:
    command, *rest = sidecar_container()["args"]
    assert command == "serve"
    assert {"--engine-url", "--listen", "--http-listen"} <= named(rest) <= flags("serve")


def test_compose_sets_variables_of_flags_that_it_knows() -> None:
    environment = document("compose/compose.yaml")["services"]["sidecar"]["environment"]
    assert of_variables(environment) <= flags("serve")


def test_the_unit_starts_it_with_flags_and_variables_that_it_knows() -> None:
    settings = unit("weight-sync.service")
    (started,) = settings["ExecStart"]
    assert started.split()[:2] == ["/opt/weight-sync/bin/sglang-weight-sync", "serve"]
    assert named(started.split()) <= flags("serve")
    assert of_variables(one.partition("=")[0] for one in settings["Environment"]) <= flags("serve")


def test_the_units_file_of_settings_has_keys_that_it_knows_those_in_comments_too() -> None:
    text = (DEPLOY / "systemd/sidecar.toml").read_text()
    meant = {**tomllib.loads(text), **tomllib.loads("\n".join(re.findall(r"(?m)^# (\w+ = .*)$", text)))}
    assert {f"--{key.replace('_', '-')}" for key in meant} <= flags("serve")
    assert {"tls_certificate", "engine_url"} <= meant.keys()


def test_the_image_sets_variables_and_asks_for_health_with_flags_that_it_knows() -> None:
    text = (DEPLOY / "docker/Dockerfile").read_text()
    assert of_variables(re.findall(rf"{VARIABLE}[A-Z_]+", text)) <= flags("serve")
    (asked,) = re.findall(r'\["sglang-weight-sync", "health", (.*)\]', text)
    assert named(asked.replace('"', "").split(", ")) <= flags("health")
