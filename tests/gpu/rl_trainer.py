"""A trainer on one GPU that shares it with the engine, as RL does it; prints a JSON line per step.

    python -m tests.gpu.rl_trainer FOLDER STEPS

Each step: release the engine's KV cache and weights, train in the memory that this frees, resume the weights, update
them, resume the KV cache, generate. The weights are negated by every step, so that tokens must alternate.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from adapter.verl_engine import VerlEngine
from tests.gpu.qwen3 import MIDDLE, NamedTensors, random_weights, write_config

PROMPT = [11, 22, 33, 44, 55]
ACTIVATIONS_BYTES = 40 << 30
"""What training takes for a moment: more than the GPU has while the engine is resident."""
SERVER_ARGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "skip_server_warmup": True,
    "disable_overlap_schedule": True,
    "sampling_backend": "pytorch",
    "attention_backend": "triton",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.6,
    "enable_memory_saver": True,
}


def main() -> None:
    """All steps, and an end that leaves nothing behind."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.cuda.set_device(0)
    weights = random_weights(MIDDLE, 1, torch.device("cuda", 0))
    model = write_config(MIDDLE, folder / "model")
    environment = {"HF_HUB_OFFLINE": "1"}
    with VerlEngine(
        model_path=str(model), log_dir=folder, env=environment, bucket_bytes=1 << 30, **SERVER_ARGS
    ) as engine:
        engine.update_weights_from_tensor(weights)
        generate(engine)  # compiles kernels
        for step in range(steps):
            print(json.dumps({"step": step, **rl_step(engine, weights)}), flush=True)


def rl_step(engine: VerlEngine, weights: NamedTensors) -> dict[str, Any]:
    """One round, with what the GPU held at its stages, in MiB, and how long they took, in seconds."""
    resident = used_mib()
    started = time.monotonic()
    engine.release_memory_occupation(["kv_cache", "weights"])
    released = used_mib()
    train(weights)
    trained = time.monotonic()
    engine.resume_memory_occupation(["weights"])
    result = engine.update_weights_from_tensor(weights)
    updated = time.monotonic()
    engine.resume_memory_occupation(["kv_cache"])
    tokens = generate(engine)
    return {
        "resident_mib": resident,
        "released_mib": released,
        "end_mib": used_mib(),
        "trainer_bytes": torch.cuda.memory_allocated(),
        "unreleased": engine.client.unreleased_bytes,
        "version": result.weight_version,
        "tokens": tokens,
        "train_s": trained - started,
        "update_s": updated - trained,
    }


def train(weights: NamedTensors) -> None:
    """Changes every weight, with the memory that training takes."""
    activations = torch.empty(ACTIVATIONS_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    torch._foreach_neg_([tensor for _, tensor in weights])
    torch.cuda.synchronize()
    del activations
    torch.cuda.empty_cache()


def generate(engine: VerlEngine) -> list[int]:
    """Greedy tokens."""
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    tokens: list[int] = engine.generate(input_ids=PROMPT, sampling_params=sampling, timeout=300)["output_ids"]
    return tokens


def used_mib() -> int:
    """Of the GPU, by everybody, as the driver says."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0])


if __name__ == "__main__":
    main()
