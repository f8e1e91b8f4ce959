"""Which GPU an engine's rank runs on: from files as the driver and the kernel show them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sidecar.engine import gpus
from sidecar.engine.info import EngineInfo, parse

# As an H100 under driver 580.159 shows it.
INFORMATION = """\
Model: \t\t {model}
IRQ:   \t\t 41
GPU UUID: \t GPU-{uuid}
Video BIOS: \t 96.00.cf.00.01
Bus Type: \t PCIe
DMA Size: \t 52 bits
DMA Mask: \t 0xfffffffffffff
Bus Location: \t {bus}
Device Minor: \t {minor}
GPU Firmware: \t 580.159.04
GPU Excluded:\t {excluded}
"""
H100, L40 = "NVIDIA H100 80GB HBM3", "NVIDIA L40S"
A, B, C = (f"{letter * 8}-5ad9-d3a4-0cda-31ff98e9d025" for letter in "abc")
ENGINE, CHILD, STRANGER = "4711", "4712", "9"
PROCESS = f"{ENGINE}/123456"


@dataclass
class Host:
    """A root folder with the files that matter; the engine sees the same ones."""

    root: Path

    def gpu(
        self, bus: str, uuid: str, *, minor: int, model: str = H100, excluded: str = "No", device: bool = True
    ) -> None:
        folder = self.root / "proc/driver/nvidia/gpus" / bus
        folder.mkdir(parents=True)
        text = INFORMATION.format(model=model, uuid=uuid, bus=bus, minor=minor, excluded=excluded)
        (folder / "information").write_text(text)
        if device:
            (self.root / f"dev/nvidia{minor}").touch()

    def process(self, pid: str, parent: str, environment: bytes) -> None:
        folder = self.root / "proc" / pid
        folder.mkdir()
        (folder / "environ").write_bytes(environment)
        (folder / "stat").write_text(f"{pid} (a (na)me) S {parent} 1 1 0")
        (folder / "root").symlink_to(self.root)

    def engine(self, **environment: str) -> None:
        self.process(ENGINE, "1", environ(**environment))

    def of_ranks(self, *ordinals: int) -> tuple[str, ...]:
        return gpus.of_ranks(PROCESS, ordinals, self.root)


def environ(**variables: str) -> bytes:
    return b"".join(f"{name}={value}\0".encode() for name, value in {"PATH": "/usr/bin", **variables}.items())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Three equal GPUs: B, A, C in the order of the bus, which is not the order of their names or numbers."""
    (tmp_path / "dev").mkdir()
    host = Host(tmp_path)
    host.gpu("0000:9a:00.0", A, minor=0)
    host.gpu("0000:1b:00.0", B, minor=1)
    host.gpu("0001:01:00.0", C, minor=2)
    return host


@pytest.mark.parametrize(
    ("ordinals", "uuids"),
    [((0, 1, 2), (B, A, C)), ((1,), (A,)), ((0, 2), (B, C)), ((2, 3), (C, "")), ((3, 4), ()), ((-1, 0), ("", B))],
)
def test_without_a_choice_numbers_follow_the_bus(host: Host, ordinals: tuple[int, ...], uuids: tuple[str, ...]) -> None:
    host.engine()
    assert host.of_ranks(*ordinals) == uuids


@pytest.mark.parametrize(
    ("choice", "uuids"),
    [
        pytest.param("2,0", (C, B), id="numbers"),
        pytest.param(" 2 , 0 ", (C, B), id="with-spaces"),
        pytest.param(f"GPU-{C},GPU-{A}", (C, A), id="uuids"),
        pytest.param(f"GPU-{C.upper()},GPU-{A}", (C, A), id="a-uuid-in-capitals"),
        pytest.param("GPU-cccc,GPU-a", (C, A), id="the-beginnings-of-uuids"),
        pytest.param("1", (A, ""), id="one"),
        pytest.param("1,9,0", (A, ""), id="an-end-at-the-first-that-is-none"),
        pytest.param("9,0", (), id="none-from-the-beginning"),
        pytest.param("", (), id="none-at-all"),
        pytest.param("-1", (), id="none-by-minus-one"),
        pytest.param("0,0", (), id="twice-the-same"),
        pytest.param(f"GPU-b,GPU-{B}", (), id="twice-the-same-by-name"),
        pytest.param(f"0,GPU-{A}", (), id="numbers-and-uuids"),
        pytest.param("00,0x1", (), id="numbers-that-only-c-reads"),
        pytest.param("GPU-,0", (), id="any-uuid"),
        pytest.param(f"{C},{A}", (), id="uuids-without-their-prefix"),
        pytest.param(f"gpu-{C}", (), id="a-prefix-in-small-letters"),
        pytest.param(f"MIG-{A}", (), id="a-part-of-a-gpu"),
        pytest.param(f"MIG-GPU-{A}/1/0,0", (), id="a-part-of-a-gpu-in-the-old-form"),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(host: Host, choice: str, uuids: tuple[str, ...]) -> None:
    host.engine(CUDA_VISIBLE_DEVICES=choice)
    assert host.of_ranks(0, 1) == uuids


def test_a_beginning_that_two_uuids_share_names_neither(host: Host) -> None:
    host.gpu("0002:01:00.0", A.replace("5ad9", "5ad8"), minor=3)
    host.engine(CUDA_VISIBLE_DEVICES="GPU-aaaaaaaa-5ad,GPU-b")
    assert host.of_ranks(0, 1) == ()


@pytest.mark.parametrize("choice", [None, "0,1"])
def test_numbers_are_trusted_among_several_models_only_in_the_order_of_the_bus(host: Host, choice: str | None) -> None:
    host.gpu("0000:01:00.0", "dddddddd-5ad9-d3a4-0cda-31ff98e9d025", minor=3, model=L40)
    chosen = {} if choice is None else {"CUDA_VISIBLE_DEVICES": choice}
    host.engine(**chosen)
    assert host.of_ranks(0, 1) == (), "the fastest comes first, whichever that is"
    host.process(STRANGER, "1", environ(CUDA_DEVICE_ORDER="PCI_BUS_ID", **chosen))
    assert gpus.of_ranks(f"{STRANGER}/1", (1,), host.root) == (B,)
    assert gpus.visible("GPU-c", "", gpus.shown(host.root)) == [C], "a UUID needs no order"


def test_gpus_that_the_engine_has_no_device_for_are_not_counted(host: Host) -> None:
    (host.root / "dev/nvidia1").unlink()
    host.engine()
    assert host.of_ranks(0, 1) == (A, C)


def test_gpus_that_the_driver_excludes_are_not_counted(host: Host) -> None:
    host.gpu("0000:00:01.0", "????????-????-????-????-????????????", minor=3, excluded="Yes")
    host.engine()
    assert host.of_ranks(0) == (B,)


@pytest.mark.parametrize(
    ("uuid", "bus"),
    [("????????-????-????-????-????????????", "0000:00:01.0"), (A.replace("a", "d"), "nowhere")],
    ids=["uuid-not-known-yet", "no-bus"],
)
def test_a_gpu_that_is_not_fully_described_leaves_all_unknown(host: Host, uuid: str, bus: str) -> None:
    host.gpu(bus, uuid, minor=3)
    host.engine()
    assert host.of_ranks(0) == ()
    assert gpus.shown(host.root) == []


def test_gpus_that_are_divided_leave_all_unknown(host: Host) -> None:
    host.engine()
    (host.root / "proc/driver/nvidia/capabilities/gpu0/mig").mkdir(parents=True)
    assert host.of_ranks(0) == (B,)
    (host.root / "proc/driver/nvidia/capabilities/gpu0/mig/gi1").mkdir()
    assert host.of_ranks(0) == ()


def test_a_choice_that_was_made_after_the_start_shows_in_a_child_and_leaves_all_unknown(host: Host) -> None:
    host.engine(CUDA_VISIBLE_DEVICES="0,1")
    host.process(CHILD, ENGINE, environ(CUDA_VISIBLE_DEVICES="0,1"))
    host.process(STRANGER, "1", environ(CUDA_VISIBLE_DEVICES="2"))
    assert host.of_ranks(0, 1) == (B, A)
    (host.root / "proc" / CHILD / "environ").write_bytes(environ(CUDA_VISIBLE_DEVICES="2"))
    assert host.of_ranks(0, 1) == ()


def test_an_environment_that_a_title_has_overwritten_says_nothing(host: Host) -> None:
    """As setproctitle does it: not even that nothing was chosen."""
    host.process(ENGINE, "1", bytes(340))
    assert host.of_ranks(0) == ()
    host.process(CHILD, ENGINE, environ(CUDA_VISIBLE_DEVICES="2"))
    assert host.of_ranks(0) == (C,), "a child has inherited it"


@pytest.mark.parametrize("process", ["", "1234/5"], ids=["not-seen", "gone"])
def test_a_process_that_cannot_be_seen_tells_nothing(host: Host, process: str) -> None:
    assert gpus.of_ranks(process, (0,), host.root) == ()


def test_a_host_without_the_driver_shows_no_gpus(tmp_path: Path) -> None:
    host = Host(tmp_path)
    (tmp_path / "proc").mkdir()
    host.engine()
    assert gpus.shown(tmp_path) == []
    assert host.of_ranks(0) == ()


# What becomes of it.


def engine_info(**fields: object) -> EngineInfo:
    return parse({"version": "0.5.23", "tp_size": 2, "device": "cuda", "base_gpu_id": 1, "gpu_id_step": 1, **fields})


def test_what_the_operator_says_comes_first_and_else_what_is_found(host: Host) -> None:
    host.engine()
    info = replace(engine_info(), process=PROCESS)
    found = gpus.seen(info, (), host.root)
    assert (found.gpu_uuids, found.host_gpus, found.unsupported) == ((A, C), frozenset({A, B, C}), "")
    assert gpus.seen(info, (C, B), host.root).gpu_uuids == (C, B)
    assert found.placement.gpu_of(1) == C
    assert found == info, "it is the same server, however much is known of it"


def test_of_several_nodes_only_the_first_ones_gpus_are_found_and_all_can_be_named(host: Host) -> None:
    host.engine()
    info = replace(engine_info(nnodes=2), process=PROCESS)
    assert gpus.seen(info, (), host.root).gpu_uuids == (A, "")
    assert gpus.seen(info, (A, B), host.root).gpu_uuids == (A, B)


def test_where_nothing_is_found_nothing_is_known(tmp_path: Path) -> None:
    found = gpus.seen(engine_info(), (), tmp_path)
    assert (found.gpu_uuids, found.host_gpus) == ((), frozenset())


@pytest.mark.parametrize("nnodes", [1, 2])
def test_as_many_gpus_must_be_named_as_there_are_ranks(host: Host, nnodes: int) -> None:
    info = gpus.seen(engine_info(nnodes=nnodes), (A,), host.root)
    assert info.unsupported == (
        "--gpu-uuids names 1 GPUs, but the engine has tp_size 2; name one for each TP rank, in the order of the ranks"
    )


def test_an_engine_on_the_cpu_has_no_gpus(host: Host) -> None:
    info = gpus.seen(engine_info(device="cpu"), (A,), host.root)
    assert (info.gpu_uuids, info.unsupported) == ((), "")


def test_uuids_are_read_with_and_without_their_prefix_and_in_any_case() -> None:
    assert gpus.parse_uuids("") == ()
    assert gpus.parse_uuids(f"GPU-{A}, {B.upper()},gpu-{C}") == (A, B, C)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,1", "--gpu-uuids: '0' is not a GPU's UUID; list them as `nvidia-smi -L` shows them, one per TP rank"),
        (f"GPU-{A},", "--gpu-uuids: '' is not a GPU's UUID"),
        ("GPU-aaaa", "'GPU-aaaa' is not a GPU's UUID"),
        (f"MIG-{A}", "is not a GPU's UUID"),
        (f"GPU-{A},{A.upper()}", "twice; every TP rank of the engine has a GPU of its own"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gpus.parse_uuids(text)
