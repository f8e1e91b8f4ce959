"""Reinforcement learning in miniature: a tiny Llama learns to count from rewards alone, with a real SGLang server.

    python examples/grpo_toy.py --out reward.png

The server samples groups of completions, the trainer does one policy-gradient step with advantages normalised within
the groups (GRPO), and the new weights go to the server. The reward is the share of tokens that are their predecessor
plus one: 1 in 16 by chance, nearly all of them after a minute on two cores. Trainer and server agree on the sampled
tokens' log-probabilities up to rounding (the importance ratio is 1), though each step moves them far: weights arrive.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import requests
import torch
from matplotlib.figure import Figure
from torch import Tensor, optim
from transformers import LlamaConfig, LlamaForCausalLM

from adapter import WeightSyncClient
from adapter.demo.cpu_engine import cpu_engine, cuda_engine
from adapter.launch import EngineProcess, ReaperProcess, SidecarConfig, SidecarProcess
from adapter.sources import named_weights

VOCAB, GROUP, NUM_TOKENS, LEARNED = 16, 24, 8, 0.8
ON_GPU = torch.cuda.is_available()
TOLERANCE = 0.05 if ON_GPU else 0.001  # Triton's attention on GPUs rounds to TF32 on its way
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"], vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip


class Step(NamedTuple):
    """The mean reward and importance ratio, and the largest differences of a sampled token's log-probability."""

    reward: float
    ratio: float
    apart: float  # between server and trainer
    moved: float  # by the training step: what ``apart`` would be with weights that are one step old


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """A server and its sidecar: the address of each. The reaper ends them even if this process is killed."""
    with tempfile.TemporaryDirectory(prefix="grpo-") as name, ReaperProcess(Path(name, "reaper.log")) as reaper:
        folder, listen = Path(name), f"unix:{name}/sidecar.sock"
        reaper.remove(folder)
        CONFIG.save_pretrained(folder / "model")
        make_config = cuda_engine if ON_GPU else cpu_engine
        config = make_config(folder, folder / "model", extra_args=("--dtype", "float32", "--random-seed", "0"))
        with EngineProcess(config, reaper=reaper) as engine:
            beside = SidecarConfig(engine_url=engine.url, listen=listen, log_path=folder / "sidecar.log")
            with SidecarProcess(beside, reaper=reaper):
                yield engine.url, listen


def sample(session: requests.Session, url: str, version: str) -> tuple[Tensor, Tensor]:
    """A group of completions for each prompt of one token: whole sequences, and the server's log-probabilities."""
    prompts = [[token] for token in range(VOCAB) for _ in range(GROUP)]
    sampling = {"temperature": 1.0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
    reply = session.post(f"{url}/generate", json=body, timeout=300)
    assert reply.ok, f"/generate answered {reply.status_code}: {reply.text}"
    answers = [(answer["output_ids"], answer["meta_info"]) for answer in reply.json()]
    assert all(meta["weight_version"] == version for _, meta in answers), f"some samples are not of version {version}"
    tokens = [prompt + output for prompt, (output, _) in zip(prompts, answers, strict=True)]
    logprobs = [[entry[0] for entry in meta["output_token_logprobs"]] for _, meta in answers]
    return torch.tensor(tokens), torch.tensor(logprobs)


def token_logprobs(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """The trainer's log-probability of each sampled token."""
    scores: Tensor = model(tokens[:, :-1]).logits.log_softmax(-1)
    return scores.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def learn(model: LlamaForCausalLM, optimizer: optim.Optimizer, tokens: Tensor, sampled: Tensor) -> Step:
    """One policy-gradient step: completions that were better than their group become more likely."""
    rewards = (tokens[:, 1:] == (tokens[:, :-1] + 1) % VOCAB).float().mean(1).view(VOCAB, GROUP)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    logprobs = token_logprobs(model, tokens)
    ratio = (logprobs - sampled).exp()
    optimizer.zero_grad()
    torch.autograd.backward(-(ratio * advantages.view(-1, 1)).mean())
    optimizer.step()
    apart, moved = (logprobs - sampled).abs().max(), (token_logprobs(model, tokens) - logprobs).abs().max()
    return Step(rewards.mean().item(), ratio.mean().item(), apart.item(), moved.item())


def train(client: WeightSyncClient, session: requests.Session, url: str, num_steps: int) -> list[Step]:
    """The loop: sync, sample, learn."""
    model = LlamaForCausalLM(CONFIG).to("cuda" if ON_GPU else "cpu")
    optimizer = optim.AdamW(model.parameters(), lr=4e-3)
    steps: list[Step] = []
    for number in range(1, num_steps + 1):
        client.update_weights(named_weights(model), version=str(number))
        tokens, sampled = (tensor.to(model.device) for tensor in sample(session, url, str(number)))
        step = learn(model, optimizer, tokens, sampled)
        told = f"reward {step.reward:.3f}, ratio {step.ratio:.6f}, apart {step.apart:.0e}, moved {step.moved:.1f}"
        print(f"step {number:2d}: {told}", flush=True)
        assert step.apart < TOLERANCE, f"the server does not sample with the trainer's weights: {step}"
        steps.append(step)
    return steps


def draw(steps: list[Step], out: Path) -> None:
    """The rewards, and below them how well trainer and server agree."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    numbers = range(1, len(steps) + 1)
    above.plot(numbers, [step.reward for step in steps], label="share of tokens that count on")
    above.axhline(1 / VOCAB, linestyle=":", label="chance")
    above.set(ylabel="reward", ylim=(0, 1.02), title="Learning to count from rewards, sampled by SGLang")
    below.semilogy(numbers, [step.moved for step in steps], label="moved by the training step")
    below.semilogy(numbers, [step.apart for step in steps], label="between server and trainer")
    below.set(xlabel="step", ylabel="log-probabilities, at most")
    for axes in (above, below):
        axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Train, draw, and see that it has learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("reward.png"), help="where the curve goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more only cost time in a model so small
    with serving() as (url, target), WeightSyncClient(target, rank=0, tp_size=1) as client, requests.Session() as http:
        http.trust_env = False  # no proxy stands between this host and itself
        client.wait_ready()
        steps = train(client, http, url, options.steps)
    draw(steps, options.out)
    last = sum(step.reward for step in steps[-3:]) / len(steps[-3:])
    print(f"reward {steps[0].reward:.3f} at first, {last:.3f} over the last three steps; drawn to {options.out}")
    assert last > LEARNED, f"the reward has come to {last:.3f} only, less than {LEARNED}"


if __name__ == "__main__":
    main()
