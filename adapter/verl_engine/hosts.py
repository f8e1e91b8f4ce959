"""What of this host and its GPUs the other ranks, and a server that is started here, need to know.

Invariant: nothing is guessed from an ordinal. A GPU is known by its UUID; two ranks are on one host if they share its
kernel, its processes and its network.
"""

import getpass
import os
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_NVIDIA_SMI_S = 30.0
_GPU_PLACEMENT_ARGS = ("base_gpu_id", "gpu_id_step")
_TORCHRUN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_TORCHRUN_PREFIX = "TORCHELASTIC_"
# How the trainer's allocator works is none of the server's business: its memory saver refuses expandable segments.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def host_identity() -> str:
    """The same for two processes that can see each other's processes and reach each other on loopback."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))])


def host_address() -> str:
    """How other hosts reach this one, as far as it knows itself."""
    return socket.getfqdn()


def trainer_gpu(server_args: Mapping[str, object], env: Mapping[str, str | None]) -> str | None:
    """The UUID of this rank's GPU; None if the server is not on GPUs, or its caller has placed it himself."""
    placed = any(server_args.get(name) is not None for name in _GPU_PLACEMENT_ARGS) or "CUDA_VISIBLE_DEVICES" in env
    if placed or server_args.get("device") == "cpu" or not torch.cuda.is_available():
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def gpu_environment(uuids: Sequence[str]) -> dict[str, str | None]:
    """Variables that show a server exactly these GPUs, in this order. Raises ``ValueError`` if two ranks share one."""
    for rank, uuid in enumerate(uuids):
        if uuid in uuids[:rank]:
            raise ValueError(
                f"two ranks of the trainer use {uuid}; call torch.cuda.set_device(local_rank) before making the engine"
            )
    numbers = _numbers_of_gpus()
    # CUDA takes UUIDs too, but SGLang's own all-reduce reads the variable as numbers.
    if all(uuid in numbers for uuid in uuids):
        visible = ",".join(numbers[uuid] for uuid in uuids)
        return {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}


def _numbers_of_gpus() -> dict[str, str]:
    """UUID -> number in the order of the PCI bus; empty where nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=uuid,index", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition(",") for line in said.splitlines())
    return {uuid.strip(): number.strip() for uuid, _, number in pairs}


def clean_environment(environ: Mapping[str, str], temporary: Path) -> dict[str, str | None]:
    """What a server must not inherit from a trainer, and its own folder for temporary files.

    Under torchrun's variables SGLang's ranks look for torchrun's store instead of making their own, with torch 2.11 at
    least. The folder holds the sockets that SGLang's processes leave behind; what is worth keeping, torch's compiled
    code, stays where it was.
    """
    trainers = (*_TORCHRUN, *_ALLOCATOR)
    unset = {name: None for name in environ if name in trainers or name.startswith(_TORCHRUN_PREFIX)}
    return {**unset, "TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": _inductor_cache(environ)}


def _inductor_cache(environ: Mapping[str, str]) -> str:
    default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return environ.get("TORCHINDUCTOR_CACHE_DIR") or str(default)
