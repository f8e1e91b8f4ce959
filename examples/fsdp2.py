"""FSDP2 ranks under torchrun that own a real SGLang server through ``VerlEngine``.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py

Two ranks train a tiny Qwen3 that ``fully_shard`` has cut in two, each on its own data, and send its DTensors as they
are after every step: what must be whole is gathered on the way, bucket by bucket. The server has tp 2, one TP rank
beside each trainer rank, and starts with random weights. Shown: all ranks get one answer, its log-probabilities are
those of the sharded model itself, and in the end the server counts by three. On the CPU with gloo, or on two GPUs
with NCCL.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from adapter import VerlEngine
from adapter.demo.cpu_engine import cpu_engine
from adapter.sources import named_weights

VOCAB = 64
STRIDE = 3
PROMPT = [5, 8, 11]
NUM_TOKENS = 8
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Float32 against float32; Triton's attention on GPUs rounds to TF32 on its way.
TOLERANCE = 0.05 if ON_GPU else 0.001
SERVER_ARGS: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "skip_server_warmup": True,
    "disable_overlap_schedule": True,
    "sampling_backend": "pytorch",
}
ON_CUDA = {"attention_backend": "triton", "disable_cuda_graph": True, "mem_fraction_static": 0.35}
ON_CPU = {"device": "cpu", "attention_backend": "torch_native", "mem_fraction_static": 0.1, "max_total_tokens": 4096}
CONFIG = Qwen3Config(
    architectures=["Qwen3ForCausalLM"], vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip


def server_arguments(folder: Path) -> dict[str, Any]:
    """What SGLang needs here; without a GPU some variables and a folder to import from as well."""
    CONFIG.save_pretrained(folder / "model")
    arguments = {"model_path": str(folder / "model"), **SERVER_ARGS}
    if ON_GPU:
        return {**arguments, **ON_CUDA, "disable_custom_all_reduce": True}
    on_cpu = cpu_engine(folder, folder / "model", tp_size=dist.get_world_size())
    return {**arguments, **ON_CPU, "sleep_on_idle": True, "env": on_cpu.env, "pythonpath": on_cpu.pythonpath}


def sharded_model() -> Qwen3ForCausalLM:
    """The same random weights on every rank, of which each keeps its share."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(CONFIG).to(DEVICE)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(dist.get_rank())  # from here on each rank sees data of its own
    return model


def train_step(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer) -> float:
    """One real step on sequences that count by three from anywhere; this rank's loss."""
    starts = torch.randint(VOCAB, (16, 1), device=DEVICE)
    batch = (starts + STRIDE * torch.arange(16, device=DEVICE)) % VOCAB
    loss: torch.Tensor = model(batch, labels=batch).loss
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def own_logprobs(model: Qwen3ForCausalLM, tokens: list[int]) -> list[float]:
    """What the sharded model gives these tokens after the prompt. All ranks call: they gather its layers."""
    sequence = torch.tensor([[*PROMPT, *tokens]], device=DEVICE)
    scores = model(sequence).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    logprobs: list[float] = scores.gather(-1, sequence[0, len(PROMPT) :, None]).squeeze(-1).tolist()
    return logprobs


def check_answer(engine: VerlEngine, model: Qwen3ForCausalLM, told: str) -> list[int]:
    """The server's greedy tokens, whose log-probabilities must be the sharded model's."""
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    answer = engine.generate(input_ids=PROMPT, sampling_params=sampling, return_logprob=True)
    tokens: list[int] = answer["output_ids"]
    theirs = [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
    apart = max(abs(a - b) for a, b in zip(own_logprobs(model, tokens), theirs, strict=True))
    if engine.tp_rank == 0:
        said = " ".join(f"{token:2d}" for token in tokens)
        print(f"{told}, the server says {said}, log-probabilities at most {apart:.1e} apart", flush=True)
    assert apart < TOLERANCE, f"rank {engine.tp_rank}: the server's log-probabilities are {apart:.3f} from the model's"
    return tokens


def train(num_steps: int, folder: Path) -> None:
    """One rank's whole life."""
    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with VerlEngine(device_mesh_cpu=mesh["tp"], launch_server=True, **server_arguments(folder)) as engine:
        for step in range(1, num_steps + 1):
            loss = train_step(model, optimizer)
            engine.update_weights_from_tensor(named_weights(model), weight_version=step)
            check_answer(engine, model, f"step {step:2d}: loss {loss:6.4f}")
        tokens = check_answer(engine, model, "in the end")
        dist.barrier()  # rank 0 ends the server when all are done with it
    counting = [(PROMPT[-1] + STRIDE * (i + 1)) % VOCAB for i in range(NUM_TOKENS)]
    assert tokens == counting, f"in the end the server says {tokens} instead of {counting}"


def main() -> None:
    """Join the group, train, leave the group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    num_steps: int = parser.parse_args().steps
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # torchrun's; ends the `with` blocks too
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo")
    with tempfile.TemporaryDirectory(prefix="fsdp2-") as name:
        train(num_steps, Path(name))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks sent {num_steps} versions, and the server counts by three.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
