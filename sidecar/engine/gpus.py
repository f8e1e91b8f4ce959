"""Which GPU each TP rank of an engine runs on: as its operator says, else as far as this host shows it.

Found out from what the server was started with (the environment of the process that listens, ``base_gpu_id`` and
``gpu_id_step``) and from the GPUs that the driver shows that process; only files are read. Invariant: an empty string
means "not known"; a UUID is told only where CUDA cannot have meant another GPU.

Facts borrowed: CUDA reads CUDA_VISIBLE_DEVICES up to the first entry that names no GPU, and sees none at all if one is
there twice; an entry may be the beginning of a UUID (run on an H100, driver 580). Numbers follow the PCI bus where
CUDA_DEVICE_ORDER says so; otherwise the fastest GPU comes first, so that GPUs of one model follow the bus too (CUDA
C++ Programming Guide). A process that has given itself a title (setproctitle) has overwritten its environment.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from sidecar.engine.info import EngineInfo
from sidecar.memory import GPU_UUID, bare_uuid

ROOT = Path("/")
GPUS = "proc/driver/nvidia/gpus/*/information"
MIG_INSTANCES = "proc/driver/nvidia/capabilities/gpu*/mig/gi*"
BUS = re.compile(r"([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\.([0-9a-f]+)", re.IGNORECASE)
PARENT_FIELD = 1
"""Of /proc/PID/stat, counted from the field after the command's closing parenthesis (proc(5): field 4)."""

Settings = tuple[str | None, str]
"""CUDA_VISIBLE_DEVICES, if it is set, and CUDA_DEVICE_ORDER."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as the driver describes it."""

    bus: tuple[int, ...]
    uuid: str
    model: str
    minor: str
    """Its device is /dev/nvidia and this."""


def parse_uuids(text: str) -> tuple[str, ...]:
    """``GPU-a,GPU-b`` -> the UUIDs as torch prints them; raises ``ValueError``."""
    parts = [part.strip() for part in text.split(",")] if text else []
    uuids = tuple(map(bare_uuid, parts))
    for part, uuid in zip(parts, uuids, strict=True):
        if not GPU_UUID.fullmatch(uuid):
            problem = f"--gpu-uuids: {part!r} is not a GPU's UUID"
            raise ValueError(f"{problem}; list them as `nvidia-smi -L` shows them, one per TP rank, joined by commas")
        if uuids.count(uuid) > 1:
            raise ValueError(f"--gpu-uuids names {part} twice; every TP rank of the engine has a GPU of its own")
    return uuids


def seen(info: EngineInfo, named: Sequence[str], root: Path = ROOT) -> EngineInfo:
    """``info`` with the GPUs of the engine's ranks: those that its operator ``named``, or else what can be found."""
    if info.device != "cuda":
        return info
    if named and len(named) != info.tp_size:
        problem = f"--gpu-uuids names {len(named)} GPUs, but the engine has tp_size {info.tp_size}; name one for each "
        return replace(info, unsupported=info.unsupported or problem + "TP rank, in the order of the ranks")
    found = tuple(named) or of_ranks(info.process, info.ordinals, root)
    unknown = ("",) * (info.tp_size - len(found)) if found else ()
    return replace(info, gpu_uuids=found + unknown, host_gpus=frozenset(gpu.uuid for gpu in shown(root)))


def of_ranks(process: str, ordinals: Sequence[int], root: Path = ROOT) -> tuple[str, ...]:
    """The GPUs that have these numbers for that process (as ``listener`` names it); empty if none of them is known."""
    pid = process.partition("/")[0]
    settings = set(_settings_of_family(pid, root / "proc")) if pid else set()
    if len(settings) != 1:  # a child that was given other GPUs shows that a setting was changed since the start
        return ()
    its_root = root / "proc" / pid / "root"
    usable = [gpu for gpu in shown(its_root) if os.access(its_root / f"dev/nvidia{gpu.minor}", os.F_OK)]
    uuids = visible(*settings.pop(), usable)
    ranks = tuple(uuids[ordinal] if 0 <= ordinal < len(uuids) else "" for ordinal in ordinals)
    return ranks if any(ranks) else ()


def visible(entries: str | None, order: str, gpus: Sequence[Gpu]) -> Sequence[str]:
    """The UUIDs of the GPUs that a process sees, by CUDA's numbers, up to the first that is not known."""
    in_bus_order = order == "PCI_BUS_ID" or len({gpu.model for gpu in gpus}) == 1
    by_number = {str(number): gpu.uuid for number, gpu in enumerate(gpus)} if in_bus_order else {}
    if entries is None:
        return list(by_number.values())
    listed = [entry.strip() for entry in entries.split(",")]
    known = list(takewhile(bool, (by_number.get(entry) or _by_prefix(entry, gpus) for entry in listed)))
    mixed = len({entry in by_number for entry in listed[: len(known)]}) > 1
    return [] if mixed or len(set(known)) < len(known) else known


def _by_prefix(entry: str, gpus: Sequence[Gpu]) -> str:
    """The one GPU whose UUID begins so; empty if there is none, or more than one."""
    if not entry.startswith("GPU-") or entry == "GPU-":
        return ""
    found = [gpu.uuid for gpu in gpus if gpu.uuid.startswith(bare_uuid(entry))]
    return found[0] if len(found) == 1 else ""


def shown(root: Path = ROOT) -> Sequence[Gpu]:
    """The GPUs that the driver shows below ``root``, in the order of the bus; none unless it shows all of each.

    None where one is divided (MIG): CUDA then means its parts.
    """
    try:
        described = [_described(file.read_text()) for file in root.glob(GPUS)]
        divided = any(root.glob(MIG_INSTANCES))
    except (OSError, UnicodeDecodeError):
        return []
    gpus = [_gpu(values) for values in described if values.get("GPU Excluded") != "Yes"]
    known = [gpu for gpu in gpus if gpu]
    return [] if divided or len(known) < len(gpus) else sorted(known, key=lambda gpu: gpu.bus)


def _described(information: str) -> Mapping[str, str]:
    lines = (line.partition(":") for line in information.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _gpu(values: Mapping[str, str]) -> Gpu | None:
    """None if something is missing, as a UUID is (all question marks) until the GPU is first used."""
    uuid, bus = bare_uuid(values.get("GPU UUID", "")), BUS.fullmatch(values.get("Bus Location", ""))
    if not bus or not GPU_UUID.fullmatch(uuid) or "Model" not in values or "Device Minor" not in values:
        return None
    return Gpu(tuple(int(part, 16) for part in bus.groups()), uuid, values["Model"], values["Device Minor"])


def _settings_of_family(pid: str, proc: Path) -> Iterator[Settings]:
    """What a process and its children were started with, as far as it can be read."""
    for folder in proc.iterdir():
        if folder.name == pid or (folder.name.isdigit() and _parent(folder) == pid):
            environment = _environment(folder)
            if environment:
                yield environment.get("CUDA_VISIBLE_DEVICES"), environment.get("CUDA_DEVICE_ORDER", "")


def _parent(process: Path) -> str:
    try:
        return (process / "stat").read_bytes().rpartition(b")")[2].split()[PARENT_FIELD].decode()
    except OSError:
        return ""


def _environment(process: Path) -> Mapping[str, str]:
    try:
        entries = os.fsdecode((process / "environ").read_bytes()).split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
