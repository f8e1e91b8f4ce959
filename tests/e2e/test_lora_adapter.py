"""A LoRA adapter sent alone into real SGLang servers on the CPU, held against peft's merge and Hugging Face's tokens.

SGLang's LoRA code pins host memory whatever the device is, which torch refuses without a GPU. So these servers run
with pinning made a no-op, by the same shim that stands in for vllm; everything else is SGLang's own.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest
import requests
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from adapter import UpdateRefused, WeightSyncClient
from adapter.demo.cpu_engine import cpu_engine
from adapter.launch import EngineProcess, SidecarConfig, SidecarProcess
from adapter.sources import lora_adapter
from tests.conformance.client import EngineUnderTest
from tests.conformance.contract import LORA_CHECKS
from tests.e2e.engines import INSTALLED_RELEASE, READY_S, EngineSpec
from tests.e2e.hf_models import build, greedy, write_folder
from tests.fakes.shared_memory import files_of_this_process

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

PROMPT = [11, 42, 7]
NUM_TOKENS = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_ARGS = (
    "--enable-lora",
    "--max-lora-rank",
    "8",
    "--lora-backend",
    "torch_native",
    "--lora-target-modules",
    *TARGETS,
)
SHIM = '''"""No rotary_embedding, which is never called, and no pinned memory, which needs a GPU."""

import torch


def unpinned(make):
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made


if not torch.cuda.is_available():
    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, device=None: self


def rotary_embedding(*args, **kwargs):
    raise NotImplementedError("vllm is not installed")
'''

Result = TypeVar("Result")

ENGINES = (
    EngineSpec(INSTALLED_RELEASE, 1),
    EngineSpec(INSTALLED_RELEASE, 2),
    EngineSpec("0.5.20", 1),
    EngineSpec("0.5.15.post1", 1),
)


@dataclass(frozen=True, slots=True)
class Served:
    """A server that has the model's weights, and a sidecar beside it."""

    spec: EngineSpec
    engine: EngineProcess
    sidecar: SidecarProcess
    model: PreTrainedModel

    def clients(self) -> list[WeightSyncClient]:
        size = self.spec.tp_size
        return [WeightSyncClient(self.sidecar.listen, rank=rank, tp_size=size, device="cpu") for rank in range(size)]

    def generate(self, name: str | None) -> requests.Response:
        parameters = {"max_new_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
        body = {"input_ids": PROMPT, "lora_path": name, "sampling_params": parameters}
        return requests.post(f"{self.engine.url}/generate", json=body, timeout=120)

    def tokens(self, name: str | None) -> list[int]:
        reply = self.generate(name)
        assert reply.status_code == 200, reply.text
        return list(reply.json()["output_ids"])

    def tuned(self, seed: int) -> PeftModel:
        """The model with an adapter that changes what it says."""
        config = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS))
        adapted = get_peft_model(copy.deepcopy(self.model), config)
        generator = torch.Generator().manual_seed(seed)
        for name, factor in adapted.named_parameters():
            if ".lora_" in name:
                factor.data.normal_(0, 0.2, generator=generator)
        return adapted.eval()


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spec: EngineSpec = request.param
    folder = tmp_path_factory.mktemp("lora")
    model_path = write_folder("qwen3", folder / "model", dtype="float32")
    config = cpu_engine(
        folder,
        model_path,
        tp_size=spec.tp_size,
        engine_folder=spec.folder(),
        extra_args=LORA_ARGS,
        pythonpath=(write_shim(folder / "shim"),),
    )
    listen = f"unix:{folder / 's.sock'}"
    with (
        EngineProcess(replace(config, ready_timeout_s=READY_S)) as engine,
        SidecarProcess(SidecarConfig(engine_url=engine.url, listen=listen, log_path=folder / "sidecar.log")) as sidecar,
    ):
        ready = Served(spec, engine, sidecar, build("qwen3", dtype=torch.float32))
        on_all(ready, lambda client: client.update_weights(ready.model.state_dict().items(), version="base"))
        yield ready


def write_shim(folder: Path) -> Path:
    package = folder / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_custom_ops.py").write_text(SHIM)
    return folder


def on_all(served: Served, call: Callable[[WeightSyncClient], Result]) -> list[Result]:
    """Every rank at once; nothing of theirs is left over."""
    clients = served.clients()
    try:
        for client in clients:
            client.wait_ready()
        with ThreadPoolExecutor(len(clients)) as pool:
            results = list(pool.map(call, clients))
        assert [client.unreleased_bytes for client in clients] == [0] * len(clients)
        return results
    finally:
        for client in clients:
            client.close()


def load(served: Served, tuned: PeftModel, name: str = "tuned") -> None:
    def send(client: WeightSyncClient) -> tuple[str, ...]:
        return client.load_lora_adapter(name, lora_adapter(tuned), tuned.peft_config["default"], timeout=120)

    assert on_all(served, send) == [(name,)] * served.spec.tp_size


def merged_tokens(tuned: PeftModel) -> list[int]:
    return greedy(copy.deepcopy(tuned).merge_and_unload(), PROMPT, NUM_TOKENS)[0]


def shared_files() -> set[str]:
    gc.collect()  # the traceback of a refusal holds what was staged for it
    return files_of_this_process()


def test_a_server_with_lora_keeps_the_contract(served: Served) -> None:
    engine = EngineUnderTest(served.engine.url, served.spec.release, served.spec.tp_size)
    for check in LORA_CHECKS:
        check(engine)


def test_answers_with_the_adapter_are_those_of_the_merged_model_and_follow_the_next_one(served: Served) -> None:
    plain = greedy(served.model, PROMPT, NUM_TOKENS)[0]
    assert served.tokens(None) == plain
    seen = [plain]
    for seed in (1, 2):
        tuned = served.tuned(seed)
        load(served, tuned)
        assert served.tokens("tuned") == merged_tokens(tuned)
        assert served.tokens("tuned") not in seen
        seen.append(served.tokens("tuned"))
    assert served.tokens(None) == plain, "the model's own weights stand"
    assert on_all(served, lambda client: client.unload_lora_adapter("tuned")) != [False]
    assert served.generate("tuned").status_code == 400
    assert served.tokens(None) == plain
    assert shared_files() == set(), "memory that an adapter lived in goes with it"


def test_an_adapter_that_would_kill_the_server_is_refused_and_it_serves_on(served: Served) -> None:
    tuned = served.tuned(3)
    lonely = [(name, factor) for name, factor in lora_adapter(tuned) if "q_proj" not in name]

    def send(client: WeightSyncClient) -> str:
        with pytest.raises(UpdateRefused) as refusal:
            client.load_lora_adapter("lonely", lonely, tuned.peft_config["default"], timeout=60)
        return str(refusal.value)

    for message in on_all(served, send):
        assert "comes without q_proj" in message
    assert served.tokens(None) == greedy(served.model, PROMPT, NUM_TOKENS)[0]
