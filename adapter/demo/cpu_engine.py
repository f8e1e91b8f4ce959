"""How to start a real SGLang server for the tiny model, on a machine without a GPU or with one.

Owns the flags and variables that a CPU start needs. Each of them was found by running SGLang 0.5.15.post1, 0.5.20 and
0.5.23; the reason stands beside it. Invariant: the server runs with random weights and takes token ids, so neither a
checkpoint nor a tokenizer is needed.
"""

from collections.abc import Mapping
from pathlib import Path

from adapter.launch import EngineConfig

_COMMON_ARGS = (
    "--load-format",
    "dummy",
    "--skip-tokenizer-init",
    "--skip-server-warmup",
    "--disable-overlap-schedule",
    "--sampling-backend",
    "pytorch",
)
_CPU_ARGS = (
    "--device",
    "cpu",
    "--attention-backend",
    "torch_native",
    "--max-total-tokens",
    "4096",
    "--mem-fraction-static",
    "0.1",
    # Without this every scheduler keeps a core busy while it waits.
    "--sleep-on-idle",
)
_CUDA_ARGS = ("--attention-backend", "triton", "--disable-cuda-graph", "--mem-fraction-static", "0.35")

_VLLM_SHIM = '''"""SGLang imports `rotary_embedding` on CPUs without AMX, and never calls it.

Releases up to 0.5.20 also wait for a GPU before they compute checksums, without asking whether there is one.
"""

import torch

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda device=None: None


def rotary_embedding(*args, **kwargs):
    raise NotImplementedError("vllm is not installed")
'''


def cpu_engine(
    workdir: Path,
    model_path: Path,
    *,
    tp_size: int = 1,
    engine_folder: Path | None = None,
    extra_args: tuple[str, ...] = (),
    pythonpath: tuple[Path, ...] = (),
) -> EngineConfig:
    """A server on the CPU.

    Args:
        workdir: Where its log and its import shim go.
        model_path: A folder with a `config.json`.
        tp_size: TP ranks, each on one core.
        engine_folder: A folder holding another SGLang release than the environment's.
        extra_args: Further arguments of `sglang.launch_server`.
        pythonpath: Further folders to import from.
    """
    folders = (engine_folder,) if engine_folder else ()
    return EngineConfig(
        model_path=model_path,
        log_path=workdir / "engine.log",
        tp_size=tp_size,
        args=(*_COMMON_ARGS, *_CPU_ARGS, *extra_args),
        env=_cpu_env(tp_size),
        pythonpath=(*folders, *pythonpath, _write_vllm_shim(workdir / "vllm_shim")),
    )


def cuda_engine(workdir: Path, model_path: Path, *, tp_size: int = 1, extra_args: tuple[str, ...] = ()) -> EngineConfig:
    """A server on GPUs 0 .. tp_size - 1, small enough to leave room for trainers on the same GPUs."""
    # The GPU tests run tp 2 this way: SGLang's own all-reduce is one more thing to compile, and not what is shown.
    all_reduce = ("--disable-custom-all-reduce",) if tp_size > 1 else ()
    return EngineConfig(
        model_path=model_path,
        log_path=workdir / "engine.log",
        tp_size=tp_size,
        args=(*_COMMON_ARGS, *_CUDA_ARGS, *all_reduce, *extra_args),
        env={"HF_HUB_OFFLINE": "1"},
        ready_timeout_s=400.0,  # the first start on a machine compiles kernels
    )


def _cpu_env(tp_size: int) -> Mapping[str, str | None]:
    one_core_per_rank = "|".join(str(rank) for rank in range(tp_size))
    return {
        "HF_HUB_OFFLINE": "1",
        # A library that cannot be loaded makes the ranks talk through gloo.
        "SGLANG_NCCL_SO_PATH": "/nonexistent",
        # One rank with several thread groups is refused, hence unset there.
        "SGLANG_CPU_OMP_THREADS_BIND": one_core_per_rank if tp_size > 1 else None,
        # It wants a CPU build of sgl_kernel that no index has.
        "SGLANG_USE_CPU_ENGINE": None,
        # Compiling a few small functions takes 25 s of the first request, and a C++ compiler.
        "TORCH_COMPILE_DISABLE": "1",
        # Threads that wait for each other, on a machine that has other work to do, cost a second per request.
        "OMP_NUM_THREADS": "1",
        # A CPU server must not come across a GPU of the machine.
        "CUDA_VISIBLE_DEVICES": "",
    }


def _write_vllm_shim(folder: Path) -> Path:
    package = folder / "vllm"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "_custom_ops.py").write_text(_VLLM_SHIM)
    return folder
