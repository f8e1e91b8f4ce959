"""What a caller of VerlEngine may ask for, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from adapter.membership import Membership
from adapter.verl_engine.options import Options, launches_server, several_hosts_need_tcp

ALONE = Membership(0, 1)
PAIR = Membership(0, 2)


def options(**given: Any) -> Options:
    nothing: dict[str, Any] = {
        "launch_server": True,
        "server_args": {"model_path": "some/model"},
        "server_url": None,
        "sidecar": None,
        "sidecar_listen": None,
        "sidecar_args": (),
        "env": {},
        "pythonpath": (),
        "start_timeout": 1.0,
        "log_dir": None,
    }
    return Options(**{**nothing, **given})


@pytest.mark.parametrize(
    ("launch_server", "backend"), [(True, None), (True, "server"), (False, "server"), ("server", None)]
)
def test_the_old_names_of_a_server_process_mean_the_same(launch_server: bool | str, backend: str | None) -> None:
    assert launches_server(launch_server, backend)


def test_it_can_be_told_not_to_start_one() -> None:
    assert not launches_server(False, None)


@pytest.mark.parametrize(("launch_server", "backend"), [(True, "engine"), ("engine", None)])
def test_a_server_inside_the_trainer_is_refused_with_the_reason(launch_server: bool | str, backend: str | None) -> None:
    with pytest.raises(ValueError, match="two event loops read one ZMQ socket then, and the second update hung"):
        launches_server(launch_server, backend)


def test_another_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='vllm' is not offered"):
        launches_server(True, "vllm")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"launch_server": False}, "server_url='http://host:port' and sidecar='unix:/path.sock'"),
        ({"launch_server": False, "server_url": "http://h:1"}, "give sidecar='unix:/path.sock' as well"),
        ({"server_url": "http://h:1"}, "give sidecar='unix:/path.sock' as well"),
        ({"launch_server": False, "sidecar": "unix:/s"}, "give server_url='http://host:port' as well"),
    ],
)
def test_attaching_needs_both_addresses_and_says_which_is_missing(given: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        options(**given).check(ALONE, on_mesh=False)


def test_attaching_needs_no_model() -> None:
    attached = options(server_url="http://h:1", sidecar="unix:/s", server_args={})
    attached.check(PAIR, on_mesh=False)
    assert attached.attaches


def test_several_ranks_without_a_mesh_need_a_sidecar_address() -> None:
    options().check(PAIR, on_mesh=True)
    options(sidecar="unix:/s").check(PAIR, on_mesh=False)
    with pytest.raises(ValueError, match=r"give the same sidecar='unix:/folder/sidecar\.sock' on every rank"):
        options().check(PAIR, on_mesh=False)


def test_several_nodes_without_a_mesh_need_a_rendezvous() -> None:
    two_nodes = Membership(0, 2, nnodes=2)
    options().check(two_nodes, on_mesh=True)
    with pytest.raises(ValueError, match="needs dist_init_addr='host:port' on every rank"):
        options(sidecar="unix:/s").check(two_nodes, on_mesh=False)


def test_the_ranks_decide_the_layout() -> None:
    with pytest.raises(ValueError, match="tp_size=4 contradicts"):
        options(server_args={"model_path": "m", "tp_size": 4}).check(PAIR, on_mesh=True)


@pytest.mark.parametrize("listen", ["0.0.0.0:7001", "[::]:7001", ":7001"])
def test_every_address_of_a_host_is_none_that_others_can_reach(listen: str) -> None:
    with pytest.raises(ValueError, match="say with sidecar='host:7001' which"):
        options(sidecar_listen=listen).check(PAIR, on_mesh=True)
    options(sidecar_listen=listen, sidecar="h:7001").check(PAIR, on_mesh=True)


def test_any_port_is_none_that_others_can_know() -> None:
    with pytest.raises(ValueError, match="needs a port that the other ranks can know"):
        options(sidecar_listen="127.0.0.1:0").check(PAIR, on_mesh=True)


def test_ranks_on_several_hosts_need_an_address_of_the_network() -> None:
    several_hosts_need_tcp(["a", "a"], options())
    several_hosts_need_tcp(["a", "b"], options(sidecar_listen="10.0.0.1:7001"))
    several_hosts_need_tcp(["a", "b"], options(sidecar="10.0.0.1:7001"))
    with pytest.raises(ValueError, match="the ranks are on 2 hosts: give sidecar_listen='address:port'"):
        several_hosts_need_tcp(["a", "b"], options())


@pytest.mark.parametrize("port", [0, 70_000, "30000"])
def test_a_port_is_a_number(port: object) -> None:
    with pytest.raises(ValueError, match="is no TCP port"):
        options(server_args={"port": port}).port()


def test_arguments_with_a_place_of_their_own_are_not_passed_twice() -> None:
    given = {
        "model_path": Path("/m"),
        "tp_size": 2,
        "host": "h",
        "port": 1,
        "dist_init_addr": "h:2",
        "log_level": "info",
    }
    assert options(server_args=given).own_server_args == {"log_level": "info"}


def test_a_server_on_every_address_is_named_by_its_hosts_name() -> None:
    url = "http://127.0.0.1:30000"
    assert options(server_args={"host": "0.0.0.0"}).seen_from_elsewhere(url, "node7") == "http://node7:30000"
    assert options(server_args={}).seen_from_elsewhere(url, "node7") == url
