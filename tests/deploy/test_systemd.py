"""The units: closed, but not to what engine, sidecar and trainer share. `deploy/check.sh` has systemd look at them."""

import tomllib

import pytest

from tests.deploy.files import DEPLOY, DRAIN_S, unit

UNITS = ["weight-sync.service", "weight-sync-engine.service"]


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_closed_but_not_to_shared_memory_and_temporary_files(name: str) -> None:
    settings = unit(name)
    assert settings["NoNewPrivileges"] == ["yes"]
    assert settings["ProtectSystem"] == ["strict"]
    assert settings["CapabilityBoundingSet"] == [""]
    assert settings["User"] == settings["Group"] == ["weight-sync"]
    for shared in ("PrivateTmp", "PrivateIPC", "PrivateUsers"):
        assert settings[shared] == ["no"]


def test_the_socket_and_the_journal_are_the_users_alone_and_outlive_the_service() -> None:
    settings = unit("weight-sync.service")
    assert settings["RuntimeDirectory"] == ["weight-sync"]
    assert settings["RuntimeDirectoryMode"] == ["0700"]
    assert settings["RuntimeDirectoryPreserve"] == ["yes"]


def test_the_sidecar_is_stopped_before_its_engine_and_has_longer_than_its_drain() -> None:
    settings = unit("weight-sync.service")
    assert "weight-sync-engine.service" in settings["After"][0].split()
    assert not {"Requires", "BindsTo", "PartOf"} & settings.keys()
    drain = tomllib.loads((DEPLOY / "systemd/sidecar.toml").read_text())["drain_timeout"]
    assert drain == DRAIN_S
    assert int(settings["TimeoutStopSec"][0]) > drain
    assert settings["KillMode"] == ["mixed"]


def test_keys_are_credentials_and_never_arguments() -> None:
    for name in UNITS:
        settings = unit(name)
        assert all("/etc/weight-sync/keys/" in one for one in settings["LoadCredential"])
        assert "api-key" not in settings["ExecStart"][0]
