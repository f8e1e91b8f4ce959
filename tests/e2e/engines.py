"""Real SGLang servers on the CPU, each with a sidecar and trainer processes beside it.

Owns which releases are tested and how a whole stack is started. Invariant: every stack is real: SGLang's own
scheduler processes, one OS process per trainer rank, tensors in shared memory.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from adapter.demo import tiny_model
from adapter.demo.cpu_engine import cpu_engine
from adapter.demo.engine_http import EngineHttp
from adapter.demo.trainers import RankReport, TrainerRank, trainer_ranks, update_all
from adapter.launch import EngineProcess, SidecarConfig, SidecarProcess

INSTALLED_RELEASE = "0.5.23"
UPDATE_PATH = "/update_weights_from_tensor"
PROMPT = (11, 42, 7)
NUM_TOKENS = 12
# The tiny model has 1.4 MB.
SMALL_BUCKET_BYTES = 400_000
READY_S = 270.0  # two servers that start at once share the cores

_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One kind of server."""

    release: str
    tp_size: int

    def __str__(self) -> str:
        return f"{self.release}-tp{self.tp_size}"

    def folder(self) -> Path | None:
        """Where a release other than the environment's lies."""
        if self.release == INSTALLED_RELEASE:
            return None
        folder = Path(os.environ.get("WEIGHT_SYNC_ENGINES", _REPOSITORY / ".engines")) / self.release
        if not (folder / "sglang").is_dir():
            pytest.fail(f"SGLang {self.release} is not in {folder}; `make engines` installs it")
        return folder


TP1 = EngineSpec(INSTALLED_RELEASE, 1)
TP2 = EngineSpec(INSTALLED_RELEASE, 2)
ALL_ENGINES = (TP2, TP1, EngineSpec("0.5.20", 1), EngineSpec("0.5.15.post1", 1))

# pytest orders tests by a session fixture's parameter, so only one server runs at a time.
on_every_engine = pytest.mark.parametrize("stack", ALL_ENGINES, indirect=True, ids=str, scope="session")
on_tp2 = pytest.mark.parametrize("stack", [TP2], indirect=True, ids=str, scope="session")


@dataclass(frozen=True, slots=True)
class Stack:
    """A server, its sidecar, and what is needed to drive both."""

    spec: EngineSpec
    workdir: Path
    engine: EngineProcess
    sidecar: SidecarProcess
    http: EngineHttp
    ranks: list[TrainerRank]
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def target(self) -> str:
        """Where the sidecar listens."""
        return self.sidecar.listen

    def new_version(self) -> str:
        """A version that this stack has not had."""
        return f"v{next(self._versions)}"

    def update(self, seed: int, ranks: list[TrainerRank] | None = None) -> list[RankReport]:
        """All ranks send that seed's weights; fails the test if one of them reports an error."""
        reports = update_all(ranks or self.ranks, seed, self.new_version())
        assert [report.error for report in reports] == [""] * self.spec.tp_size
        return reports

    def tokens(self) -> list[int]:
        """What the server answers now."""
        return self.http.generate(PROMPT, NUM_TOKENS)

    def num_posts(self) -> int:
        """Loads that the server's access log names."""
        return self.engine.count_requests("POST", UPDATE_PATH)

    def load_from_disk(self, seed: int) -> None:
        """SGLang itself loads that seed's weights from safetensors."""
        checkpoint = tiny_model.save_checkpoint(self.workdir / f"disk-{seed}", tiny_model.random_weights(seed))
        self.http.load_from_disk(checkpoint)

    def more_ranks(self, bucket_bytes: int) -> contextlib.AbstractContextManager[list[TrainerRank]]:
        """Another trainer, whose buckets are smaller."""
        return trainer_ranks(self.target, ["cpu"] * self.spec.tp_size, self.workdir, bucket_bytes=bucket_bytes)


@contextlib.contextmanager
def open_stack(spec: EngineSpec, workdir: Path) -> Iterator[Stack]:
    """Starts all of it, and ends all of it."""
    model = tiny_model.write_config(workdir / "model")
    config = cpu_engine(workdir, model, tp_size=spec.tp_size, engine_folder=spec.folder())
    listen = f"unix:{workdir / 's.sock'}"
    with (
        EngineProcess(replace(config, ready_timeout_s=READY_S)) as engine,
        SidecarProcess(
            SidecarConfig(engine_url=engine.url, listen=listen, log_path=workdir / "sidecar.log")
        ) as sidecar,
        trainer_ranks(listen, ["cpu"] * spec.tp_size, workdir) as ranks,
    ):
        yield Stack(spec, workdir, engine, sidecar, EngineHttp(engine.url), ranks)
