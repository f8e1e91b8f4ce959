r"""A trainer of several nodes under torchrun, whose rank 0 brings every version into a fleet of engines.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_fleet.py

or on each of two nodes, with its own --node-rank (0, 1), and the first one's address:

    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --master-port 29400 --nproc-per-node 8 \
        examples/torchrun_fleet.py

The ranks train a tiny Qwen3 that ``fully_shard`` has cut up, each on its own data. After a step all of them name their
DTensors: rank 0 gathers them a bucket at a time and broadcasts each once to all engines (``Fleet.update_weights``), the
others take part in the gathers (``Fleet.take_part``). The engines are on whatever host their sidecars say. Here rank 0
starts two real SGLang servers beside it, which answer as the sharded model itself does and in the end count by three;
with --targets, or with --dns and --port as in Kubernetes, they are there already, and only their versions are told.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from adapter import Credentials, GenerateClient
from adapter.demo.cpu_engine import cpu_engine, cuda_engine
from adapter.fleet import Asked, Discovery, Dns, Fleet, Listed
from adapter.launch import EngineProcess, ReaperProcess, SidecarConfig, SidecarProcess
from adapter.sources import named_weights

VOCAB, STRIDE, PROMPT, NUM_TOKENS = 64, 3, [5, 8, 11], 8
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# How much more the trainer's model may like another token than the engine's: rounding, where two are equally good.
TIE = 0.05
START_S = 1800.0  # engines that load a model and compile
TORCHRUN = ("RANK", "WORLD_SIZE", "GROUP_", "LOCAL_", "MASTER_", "ROLE_", "TORCHELASTIC_")
CONFIG = Qwen3Config(
    architectures=["Qwen3ForCausalLM"], vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip


@contextlib.contextmanager
def engines(number: int) -> Iterator[tuple[list[str], list[str]]]:
    """Real servers beside this process: where their sidecars listen, and their own addresses."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchrun-fleet-")))
        reaper = stack.enter_context(ReaperProcess(folder / "reaper.log"))
        reaper.remove(folder)
        CONFIG.save_pretrained(folder / "model")
        model = folder / "model"
        started = [stack.enter_context(start(folder / f"engine-{one}", model, one, reaper)) for one in range(number)]
        for one, engine in enumerate(started):
            engine.process.wait_until(engine.is_ready, START_S)
            config = SidecarConfig(
                engine_url=engine.url,
                listen=f"unix:{folder}/engine-{one}/sidecar.sock",
                log_path=folder / f"engine-{one}" / "sidecar.log",
                args=("--require-update",),
            )
            stack.enter_context(SidecarProcess(config, reaper=reaper))
        yield [f"unix:{folder}/engine-{one}/sidecar.sock" for one in range(number)], [engine.url for engine in started]


def start(folder: Path, model: Path, number: int, reaper: ReaperProcess) -> EngineProcess:
    """A server with weights of its own, which is not waited for. It must not take itself for a rank of torchrun's."""
    folder.mkdir()
    seed = ("--dtype", "float32", "--random-seed", str(number))
    config = (cuda_engine if ON_GPU else cpu_engine)(folder, model, extra_args=seed)
    unset = dict.fromkeys(name for name in os.environ if name.startswith(TORCHRUN))
    env: dict[str, str | None] = {**unset, **config.env}
    if ON_GPU:  # after those of this node's ranks: NCCL refuses two ranks on one GPU
        env["CUDA_VISIBLE_DEVICES"] = str(int(os.environ["LOCAL_WORLD_SIZE"]) + number)
    return EngineProcess(replace(config, env=env), reaper=reaper, wait=False)


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
def regret(model: Qwen3ForCausalLM, tokens: Sequence[int]) -> float:
    """How much more, at most, the sharded model likes another token than the engines' own. All ranks call."""
    sequence = torch.tensor([[*PROMPT, *tokens]], device=DEVICE)
    scores = model(sequence).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(-1, sequence[0, len(PROMPT) :, None]).squeeze(-1)
    return float((scores.max(-1).values - chosen).max())


def ask(urls: Sequence[str], version: str) -> list[int]:
    """Greedy tokens after the prompt, as any client would get them, the same from all; none without engines."""
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    answers = [GenerateClient(url).generate(input_ids=PROMPT, sampling_params=sampling) for url in urls]
    assert all(answer.weight_version == version for answer in answers), f"not all are of version {version}: {answers}"
    said = {answer.output_ids for answer in answers}
    assert len(said) <= 1, f"the engines say different things: {answers}"
    return [token for tokens in said for token in tokens]


def wait_for(fleet: Fleet, number: int) -> None:
    """Until so many sidecars see their engines."""
    give_up = time.monotonic() + START_S
    while True:
        found = fleet.status()
        missing = [f"{target}: {status}" for target, status in found.items() if isinstance(status, Exception)]
        if len(found) - len(missing) >= number:
            return
        assert time.monotonic() < give_up, f"{len(found)} of {number} engines are named; {'; '.join(missing)}"
        time.sleep(1)


class Trainer:
    """One rank."""

    def __init__(self, fleet: Fleet, urls: Sequence[str]) -> None:
        self.rank = dist.get_rank()
        self.fleet, self.urls = fleet, urls
        self.model = sharded_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, number: int) -> list[int]:
        """Train, sync, and compare what the engines say with the model. What they say."""
        loss = train_step(self.model, self.optimizer)
        if self.rank == 0:
            result = self.fleet.update_weights(named_weights(self.model), version=str(number))
            took = f"{len(result.published)} engines in {sum(result.seconds.values()):.2f} s"
        else:
            self.fleet.take_part(named_weights(self.model))
        said = self.shared(ask(self.urls, str(number)))
        if said:
            apart = regret(self.model, said)
            assert apart < TIE, f"the sharded model likes other tokens better, by {apart:.3f}"
        if self.rank == 0:
            told = f", they say {' '.join(map(str, said))}" if said else ""
            print(f"step {number:2d}: loss {loss:6.4f}, {took}{told}", flush=True)
        return said

    def shared(self, said: list[int]) -> list[int]:
        """What rank 0 was told."""
        carried: list[list[int] | None] = [said]
        dist.broadcast_object_list(carried, src=0)
        return carried[0] or []


def train(trainer: Trainer, num_steps: int) -> None:
    """One rank's whole life."""
    said: list[int] = []
    for number in range(1, num_steps + 1):
        said = trainer.step(number)
    counting = [(PROMPT[-1] + STRIDE * (i + 1)) % VOCAB for i in range(NUM_TOKENS)]
    assert said in ([], counting), f"in the end the engines say {said} instead of {counting}"


@contextlib.contextmanager
def members(options: argparse.Namespace) -> Iterator[tuple[Discovery, list[str]]]:
    """For rank 0 where the sidecars are, and those engines that are this program's own; for the others, nothing."""
    if dist.get_rank() > 0:
        yield Asked(list), []
    elif options.dns:
        yield Dns(options.dns, options.port), []
    elif options.targets:
        yield Listed(options.targets), []
    else:
        with engines(options.engines) as (targets, urls):
            yield Listed(targets), urls


def arguments() -> argparse.ArgumentParser:
    """The command line, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engines", type=int, default=2, help="to start beside rank 0, or to wait for")
    parser.add_argument("--targets", nargs="+", help="host:port of sidecars that are there already")
    parser.add_argument("--dns", help="a name with the address of every sidecar's host")
    parser.add_argument("--port", type=int, default=9443, help="of those sidecars")
    parser.add_argument("--ca", type=Path, help="PEM that signed the sidecars' certificate: speak TLS")
    parser.add_argument(
        "--server-name", default="", help="in that certificate, if it is not of the sidecars' addresses"
    )
    parser.add_argument("--token-file", type=Path)
    return parser


def main() -> None:
    """Join the group, train, leave the group."""
    options = arguments().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # torchrun's; ends the `with` blocks too
    torch.set_num_threads(1)  # more only cost time in a model so small
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo")
    credentials = Credentials(ca=options.ca, server_name=options.server_name, token_file=options.token_file)
    with members(options) as (discovery, urls), Fleet(discovery, credentials=credentials) as fleet:
        if dist.get_rank() == 0:
            wait_for(fleet, options.engines)
        train(Trainer(fleet, urls), options.steps)
        if dist.get_rank() == 0:
            for target, status in sorted(fleet.status().items()):
                told = status if isinstance(status, Exception) else f"serves version {status.weight_version}"
                print(f"{Path(target).parent.name if target.startswith('unix:') else target} {told}", flush=True)
        dist.barrier()  # rank 0 ends its engines when all are done
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks sent {options.steps} versions.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
