"""One rank of a trainer that trains a small Hugging Face model in FSDP2, and feeds a VerlEngine with it.

    python -m tests.e2e.hf_rank --fd 5 --rank 0 --size 2 --store FILE

Takes the commands of ``verl_rank``, and of its own:

{"do": "build", "name": "qwen3"}  the model of that name, wrapped, the same on every rank
{"do": "train", "steps": 3}       that many steps of AdamW; the losses
{"do": "send"}                    its weights to the engine
{"do": "greedy"}                  the model's own greedy tokens and their log-probabilities
{"do": "save", "folder": "/x"}    the whole model as a checkpoint, on rank 0
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from adapter.sources import NamedTensors, as_lazy, named_weights
from tests.e2e import hf_models
from tests.e2e.verl_rank import Command, Rank, serve
from tests.e2e.verl_ranks import PROMPT

BATCH, LENGTH = 4, 16
LEARNING_RATE = 2e-3


class Trainer(Rank):
    """The model and its optimizer, besides the engine."""

    model: PreTrainedModel
    optimizer: torch.optim.AdamW

    def obey(self, command: Command) -> Any:
        """One command's result, as JSON has it."""
        own: dict[str, Callable[..., Any]] = {
            "build": self._build,
            "train": self._train,
            "send": self._send,
            "greedy": self._greedy,
            "save": self._save,
        }
        do = own.get(command["do"])
        return super().obey(command) if do is None else do(**command["arguments"])

    def _build(self, name: str) -> dict[str, bool]:
        self.model = hf_models.build(name, seed=0, dtype=torch.float32)
        for layer in self.model.model.layers:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        return {"sharded": all(isinstance(parameter, DTensor) for parameter in self.model.parameters())}

    def _train(self, steps: int) -> list[float]:
        generator = torch.Generator().manual_seed(7)
        batch = torch.randint(3, hf_models.VOCAB, (BATCH, LENGTH), generator=generator)
        losses = []
        for _ in range(steps):
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def _send(self) -> dict[str, Any]:
        result = self.engine.update_weights_from_tensor(self._weights())
        return {**asdict(result), "unreleased": self.engine.client.unreleased_bytes}

    def _greedy(self, num_tokens: int) -> tuple[list[int], list[float]]:
        return hf_models.greedy(self.model, list(PROMPT), num_tokens)

    def _save(self, folder: str) -> None:
        whole = {name: _whole(value) for name, value in self._weights()}
        if self.tp_rank == 0:
            save_file(whole, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})

    def _weights(self) -> NamedTensors:
        """Under the checkpoint's names: without a tied head, with one tensor per expert."""
        return named_weights(self.model, split_experts=True)


def _whole(value: Any) -> torch.Tensor:
    lazy = as_lazy(value)
    tensor = torch.empty(lazy.shape, dtype=lazy.dtype)
    lazy.write(tensor)
    return tensor


if __name__ == "__main__":
    sys.exit(serve(Trainer))
