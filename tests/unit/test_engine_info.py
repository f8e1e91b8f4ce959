"""What follows from an SGLang server's own words about itself."""

import pytest

from sidecar.engine.info import EngineInfo, parse

SERVER_INFO = {"version": "0.5.23", "tp_size": 2, "device": "cpu", "pp_size": 1, "dp_size": 1}


def info_of(**fields: object) -> EngineInfo:
    return parse(SERVER_INFO | fields)


@pytest.mark.parametrize(
    ("version", "dialect", "uses_sessions"),
    [
        ("0.5.15.post1", "0.5.15.post1", False),
        ("0.5.16", "0.5.15.post1", False),
        ("0.5.20", "0.5.15.post1", False),
        ("0.5.20.post3", "0.5.15.post1", False),
        ("0.5.21", "0.5.21", True),
        ("0.5.21rc1", "0.5.21", True),
        ("0.5.21.dev123+gabcdef", "0.5.21", True),
        ("0.5.23", "0.5.21", True),
        ("0.5.23+cpu", "0.5.21", True),
        ("0.5.24.dev20260101", "0.5.21", True),
        ("0.6.0rc0", "0.5.21", True),
        ("1.0", "0.5.21", True),
    ],
)
def test_each_release_follows_its_dialect(version: str, dialect: str, uses_sessions: bool) -> None:
    info = info_of(version=version)
    assert (info.dialect.name, info.dialect.uses_sessions, info.unsupported) == (dialect, uses_sessions, "")
    assert info.version == version


@pytest.mark.parametrize("version", ["0.5.15", "0.5.14", "0.4.9.post2", "0.5.15.post1.dev3", "0.5.15rc2"])
def test_a_release_older_than_the_oldest_is_refused_by_name(version: str) -> None:
    assert info_of(version=version).unsupported == f"SGLang {version} is older than 0.5.15.post1; upgrade the engine"


@pytest.mark.parametrize("version", ["", "main", "unknown"])
def test_a_server_without_a_readable_version_is_refused(version: str) -> None:
    assert info_of(version=version).unsupported == f"it calls itself SGLang {version!r}, which is no version"


def test_a_server_that_says_no_version_at_all_is_refused() -> None:
    assert "which is no version" in parse({"tp_size": 1}).unsupported


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pp_size": 2}, "start it with tp_size or ep_size instead, or use SGLang's own /update_weights_from_disk"),
        ({"dp_size": 2}, "(dp_size > 1): give each replica its own server and sidecar instead"),
        ({"dp_size": 2, "attn_dp_size": 1, "enable_dp_attention": False}, "data-parallel replicas"),
        ({"weight_cache_mode": "on"}, "--weight-cache-mode is on"),
        ({"frontend": "rust"}, "frontend 'rust' has no weight-update routes"),
    ],
)
def test_a_layout_that_cannot_be_updated_is_refused_by_name(fields: dict[str, object], said: str) -> None:
    assert said in info_of(**fields).unsupported


@pytest.mark.parametrize(
    "fields",
    [
        {"dp_size": 2, "enable_dp_attention": True},  # until 0.5.21
        {"dp_size": 1, "attn_dp_size": 2, "enable_dp_attention": True},  # from 0.5.22 on
        {"ep_size": 2},
        {"ep_size": 2, "attn_dp_size": 2, "enable_dp_attention": True},
        {"nnodes": 2},
        {"weight_cache_mode": "off", "frontend": "python"},
        {"weight_cache_mode": None, "frontend": None},
    ],
)
def test_layouts_that_can_be_updated_are_not_refused(fields: dict[str, object]) -> None:
    assert info_of(**fields).unsupported == ""


def test_tp_size_and_device_are_taken_over() -> None:
    assert (info_of().tp_size, info_of().device) == (2, "cpu")
    assert (info_of(tp_size=8, device="cuda").tp_size, info_of(device=None).device) == (8, "cuda")


def test_the_servers_keys_are_not_kept() -> None:
    assert "secret" not in repr(info_of(api_key="secret", admin_api_key="secret"))


@pytest.mark.parametrize(
    ("tp_size", "nnodes", "num_here"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (8, 4, 2), (1, 2, 1), (2, 0, 2)]
)
def test_the_ranks_are_spread_over_the_nodes_one_node_after_the_other(tp_size: int, nnodes: int, num_here: int) -> None:
    info = info_of(tp_size=tp_size, nnodes=nnodes)
    assert (info.nnodes, info.placement.num_here) == (nnodes, num_here)


def test_another_number_of_nodes_is_another_server() -> None:
    assert info_of(nnodes=2) != info_of(nnodes=1)


@pytest.mark.parametrize(
    ("fields", "ordinals"),
    [
        ({"base_gpu_id": 0, "gpu_id_step": 1}, (0, 1, 2, 3)),
        ({"base_gpu_id": 4, "gpu_id_step": 1}, (4, 5, 6, 7)),
        ({"base_gpu_id": 1, "gpu_id_step": 2}, (1, 3, 5, 7)),
        ({"base_gpu_id": 4, "gpu_id_step": 2, "nnodes": 2}, (4, 6)),
        ({}, ()),
        ({"base_gpu_id": 0}, ()),
        ({"base_gpu_id": None, "gpu_id_step": 1}, ()),
        ({"base_gpu_id": 0, "gpu_id_step": 1, "use_ray": True}, ()),
    ],
)
def test_cudas_number_of_each_ranks_gpu_follows_from_what_the_server_was_started_with(
    fields: dict[str, object], ordinals: tuple[int, ...]
) -> None:
    assert info_of(tp_size=4, device="cuda", **fields).ordinals == ordinals
