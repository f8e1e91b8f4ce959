"""A fleet whose sidecars are found by DNS, and so addressed by number, behind TLS of one name and a token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter import Credentials, NotAllowed, SidecarUnreachable, WeightSyncError
from adapter.fleet import Dns, Fleet
from adapter.launch import SidecarConfig, SidecarProcess, free_port
from benchmarks.fleet.no_network import NoNetwork
from tests.fakes import ScriptedEngine
from tests.integration.certificates import Authority
from tests.integration.support import wait_until

NAME = "sidecars.weight-sync-fleet.svc"
ADDRESS = "127.0.0.1"
WEIGHTS = [("layer.0.weight", torch.arange(6.0).reshape(2, 3))]


class Guarded:
    """One engine and its sidecar."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.token = folder / "token"
        self.token.write_text("of-those-who-update")
        self.port = free_port()
        self._folder = folder

    def credentials(self, *, server_name: str = NAME, token: str = "") -> Credentials:
        file = None if token else self.token
        return Credentials(ca=self.authority.path, server_name=server_name, token_file=file, token=token)

    def config(self, engine_url: str) -> SidecarConfig:
        files = self.authority.issue(NAME, file="server")
        tls = (f"--tls-certificate={files.certificate}", f"--tls-key={files.key}")
        return SidecarConfig(
            engine_url=engine_url,
            listen=f"{ADDRESS}:{self.port}",
            log_path=self._folder / "log",
            args=(*tls, f"--update-token-file={self.token}", "--require-update"),
            grace_s=0.0,
            credentials=self.credentials(),
        )

    def fleet(self, credentials: Credentials) -> Fleet:
        return Fleet(Dns(ADDRESS, self.port), credentials=credentials, make_group=NoNetwork)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    one = Guarded(tmp_path)
    with ScriptedEngine(tp_size=1) as engine, SidecarProcess(one.config(engine.url)):
        yield one


def status(fleet: Fleet) -> WeightSyncError | str:
    """What the only sidecar says: its version, or why not."""
    ((_, found),) = fleet.status().items()
    return found if isinstance(found, WeightSyncError) else found.weight_version


def test_a_fleet_that_knows_the_name_in_the_certificate_brings_its_versions(guarded: Guarded) -> None:
    with guarded.fleet(guarded.credentials()) as fleet:
        wait_until(lambda: isinstance(status(fleet), str))
        result = fleet.update_weights(WEIGHTS, version="7", timeout=30)
        assert result.published == [f"{ADDRESS}:{guarded.port}"]
        assert status(fleet) == "7"


@pytest.mark.parametrize("name", ["", "another.name"])
def test_a_certificate_of_another_name_than_the_one_expected_is_not_trusted(guarded: Guarded, name: str) -> None:
    with guarded.fleet(guarded.credentials(server_name=name)) as fleet:
        assert isinstance(status(fleet), SidecarUnreachable)


def test_a_wrong_token_is_refused(guarded: Guarded) -> None:
    with guarded.fleet(guarded.credentials(token="wrong")) as fleet:
        assert isinstance(status(fleet), NotAllowed)


def test_a_server_name_without_tls_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="server_name is about TLS"):
        Credentials(server_name=NAME)
