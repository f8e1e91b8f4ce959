"""What a figure was measured on: said once at the head of every run."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """As far as it matters to a figure."""

    cores: int
    gpus: tuple[str, ...]
    """Names, as nvidia-smi has them."""
    driver: str
    python: str
    torch: str
    sglang: str
    """The release that served, or "scripted"."""
    engine_args: tuple[str, ...] = ()


def this_machine(sglang: str, engine_args: tuple[str, ...] = ()) -> Machine:
    """Asks the driver, so that this process does not open a GPU."""
    import torch

    gpus, drivers = _gpus()
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        gpus=gpus,
        driver=drivers[0] if drivers else "",
        python=platform.python_version(),
        torch=torch.__version__,
        sglang=sglang,
        engine_args=engine_args,
    )


def _gpus() -> tuple[tuple[str, ...], tuple[str, ...]]:
    if shutil.which("nvidia-smi") is None:
        return (), ()
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.splitlines()
    pairs = [line.split(", ") for line in listed if ", " in line]
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
