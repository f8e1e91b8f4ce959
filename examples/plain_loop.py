"""A plain PyTorch training loop that brings its weights to a real SGLang server after every optimiser step.

    python examples/plain_loop.py

A tiny Llama learns to count by three, then by five instead. The server starts with random weights of its own and no
checkpoint, so whatever it answers correctly was sent to it: after each step its greedy tokens are the ones that the
trainer's model prefers, and after each lesson it counts. One TP rank; on the CPU, or on the first GPU if there is one.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapter import GenerateClient, Generation, WeightSyncClient
from adapter.demo.cpu_engine import cpu_engine, cuda_engine
from adapter.launch import EngineProcess, ReaperProcess, SidecarConfig, SidecarProcess
from adapter.sources import named_weights

VOCAB = 64
STRIDES = (3, 5)
PROMPT = [5, 8, 11]
NUM_TOKENS = 8
ON_GPU = torch.cuda.is_available()
# How much more the trainer's model may like another token than the server's: rounding, where two are equally good.
TIE = 0.01
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"], vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """A server and its sidecar: the address of each. The reaper ends them even if this process is killed."""
    with tempfile.TemporaryDirectory(prefix="plain-loop-") as name, ReaperProcess(Path(name, "reaper.log")) as reaper:
        folder, listen = Path(name), f"unix:{name}/sidecar.sock"
        reaper.remove(folder)
        CONFIG.save_pretrained(folder / "model")
        make_config = cuda_engine if ON_GPU else cpu_engine
        config = make_config(folder, folder / "model", extra_args=("--dtype", "float32"))
        with EngineProcess(config, reaper=reaper) as engine:
            beside = SidecarConfig(engine_url=engine.url, listen=listen, log_path=folder / "sidecar.log")
            with SidecarProcess(beside, reaper=reaper):
                yield engine.url, listen


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, stride: int) -> float:
    """One real step on sequences that count by ``stride`` from anywhere; the loss."""
    starts = torch.randint(VOCAB, (32, 1), device=model.device)
    batch = (starts + stride * torch.arange(16, device=model.device)) % VOCAB
    loss: torch.Tensor = model(batch, labels=batch).loss
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def regret(model: LlamaForCausalLM, tokens: tuple[int, ...]) -> float:
    """How much more, at most, the trainer's model likes another token than the one that the server chose."""
    sequence = torch.tensor([[*PROMPT, *tokens]], device=model.device)
    scores = model(sequence).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(-1, sequence[0, len(PROMPT) :, None]).squeeze(-1)
    return float((scores.max(-1).values - chosen).max())


def ask(server: GenerateClient) -> Generation:
    """Greedy tokens after the prompt, as any client of the server would ask for them."""
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    return server.generate(input_ids=PROMPT, sampling_params=sampling)


class Trainer:
    """The model, and the server that follows it."""

    def __init__(self, model: LlamaForCausalLM, client: WeightSyncClient, server: GenerateClient) -> None:
        self.model, self.client, self.server = model, client, server
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.step = 0

    def lesson(self, stride: int, num_steps: int) -> None:
        """Steps until the server counts by ``stride``."""
        for _ in range(num_steps):
            loss = train_step(self.model, self.optimizer, stride)
            self.step += 1
            started = time.perf_counter()
            # The one line that a training loop needs for it.
            self.client.update_weights(named_weights(self.model), version=str(self.step))
            self.check(f"loss {loss:6.4f}, sync {1000 * (time.perf_counter() - started):4.0f} ms")
        learned = ask(self.server).output_ids
        counting = tuple((PROMPT[-1] + stride * (i + 1)) % VOCAB for i in range(NUM_TOKENS))
        assert learned == counting, f"after the lesson the server says {learned} instead of {counting}"

    def check(self, told: str) -> None:
        """What the server says now must be what the model that was just sent would say."""
        answer = ask(self.server)
        print(f"step {self.step:2d}: {told}, the server says {' '.join(map(str, answer.output_ids))}", flush=True)
        assert answer.weight_version == str(self.step), f"it has answered with weights of {answer.weight_version!r}"
        difference = regret(self.model, answer.output_ids)
        assert difference < TIE, f"the trainer's model likes other tokens better, by {difference:.3f}"


def main() -> None:
    """Two lessons, and after each step a look at the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each lesson")
    num_steps: int = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more only cost time in a model so small
    model = LlamaForCausalLM(CONFIG).to("cuda" if ON_GPU else "cpu")
    with serving() as (url, target), WeightSyncClient(target, rank=0, tp_size=1) as client:
        client.wait_ready()
        trainer = Trainer(model, client, GenerateClient(url))
        for stride in STRIDES:
            trainer.lesson(stride, num_steps)
    print(f"The server was sent {trainer.step} versions and followed every one.")


if __name__ == "__main__":
    main()
