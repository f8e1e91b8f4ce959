"""The real processes of a soak: one SGLang server on the CPU at tp 2, one sidecar, two trainer ranks.

Owns their lives: what was killed is started again here. Invariant: everything is ended with the `with` block, by
process id; the server comes back on its old port and the sidecar on its old socket, as an operator would have it.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from adapter import WeightSyncClient
from adapter.demo import tiny_model
from adapter.demo.cpu_engine import cpu_engine
from adapter.demo.engine_http import EngineHttp
from adapter.errors import UpdateRefused, WeightSyncError
from adapter.launch import EngineConfig, EngineProcess, SidecarConfig, SidecarProcess
from sidecar.v1 import weight_sync_pb2 as pb
from tests.soak.answers import ServedVersions
from tests.soak.content import Content, named_tensors
from tests.soak.log import SoakLog
from tests.soak.prediction import ABORTED, AT_FIRST, COMMITTED, DIRTY, FAILED, content_digest
from tests.soak.ranks import SoakRank
from tests.soak.samples import engine_roles, mapped_files, torch_files

TP_SIZE = 2
# How long the sidecar waits for a rank that is stopped; long enough for a rank that only has no core to run on.
COLLECT_TIMEOUT_S = 12.0
BUCKET_TIMEOUT_S = 8.0
SETTLE_TIMEOUT_S = 120.0
HELPERS_TIMEOUT_S = 60.0
# It takes half a minute where nothing else runs.
ENGINE_TIMEOUT_S = 900.0
_POLL_S = 0.05
_UNSEEN = ("ENGINE_UNREACHABLE", "PAUSED")
_BUSY = ("COLLECTING", "APPLYING")


class World:
    """Everything that runs."""

    def __init__(self, workdir: Path, log: SoakLog) -> None:
        self.workdir = workdir
        self.log = log
        self.served = ServedVersions()
        self._ended = contextlib.ExitStack()
        self._retired: list[SoakRank] = []
        self.ranks: list[SoakRank] = []
        self.dead_rank_pids: list[int] = []
        self._lives_met = [0] * TP_SIZE
        self._killed_at: float | None = None
        self._left_behind: list[Path] = []
        self._config = self._engine_config()

    def _engine_config(self) -> EngineConfig:
        model = tiny_model.write_config(self.workdir / "model")
        config = cpu_engine(self.workdir, model, tp_size=TP_SIZE)
        return dataclasses.replace(config, ready_timeout_s=ENGINE_TIMEOUT_S)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as started:
            started.callback(self._stop_all)
            self.engine = EngineProcess(self._config)
            self._config = dataclasses.replace(self._config, port=self.engine.port)
            self.served.published(AT_FIRST.version, "", since=0.0, superseded=0.0)
            self.http = EngineHttp(self.engine.url)
            self.sidecar = SidecarProcess(self._sidecar_config())
            self.control = WeightSyncClient(self.target, rank=0, tp_size=TP_SIZE)
            self.ranks = [self._new_rank(rank) for rank in range(TP_SIZE)]
            for rank in self.ranks:
                rank.wait_ready()
            self.wait_for_engine()
            self._ended = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.close()

    def _stop_all(self) -> None:
        """What exists by now. The server before the helpers of dead ranks, which stay while it is connected to them."""
        with contextlib.ExitStack() as stack:
            for rank in self._retired:
                stack.callback(rank.process.stop)
            for name in ("engine", "sidecar"):
                if hasattr(self, name):
                    stack.callback(getattr(self, name).stop)
            if hasattr(self, "control"):
                stack.callback(self.control.close)
            for rank in self.ranks:
                stack.callback(rank.stop)

    @property
    def target(self) -> str:
        """Where the sidecar listens."""
        return f"unix:{self.workdir / 's.sock'}"

    def _sidecar_config(self) -> SidecarConfig:
        timeouts = ("--collect-timeout", str(COLLECT_TIMEOUT_S), "--bucket-timeout", str(BUCKET_TIMEOUT_S))
        log_path = self.workdir / "sidecar.log"
        return SidecarConfig(
            engine_url=self.engine.url, listen=self.target, log_path=log_path, args=timeouts, ready_timeout_s=90.0
        )

    def _new_rank(self, rank: int) -> SoakRank:
        self._lives_met[rank] += 1
        return SoakRank(self.target, rank, TP_SIZE, self.workdir / f"rank-{rank}.log")

    # What is asked.

    @property
    def state(self) -> str:
        """The sidecar's, in its own word."""
        return pb.SidecarState.Name(self.control.status().state).removeprefix("SIDECAR_STATE_")

    @property
    def version(self) -> str:
        """What the sidecar says is served."""
        return self.control.status().weight_version

    def wait_for_engine(self) -> str:
        """Until the sidecar sees its server; the state then."""
        self.control.wait_ready(SETTLE_TIMEOUT_S)
        return self.settle()

    def settle(self) -> str:
        """Until no update is in hand; the state then."""
        wait_until(lambda: self.state not in _BUSY, SETTLE_TIMEOUT_S, "an update stayed in hand")
        return self.state

    def outcome(self, update_id: str, version: str) -> str:
        """How an update ended; where a sidecar that was started since knows nothing of it, by what it left behind."""
        state = self.settle()
        try:
            return pb.UpdateState.Name(self.control.get_update(update_id).state).removeprefix("UPDATE_STATE_")
        except UpdateRefused:
            if state == DIRTY:
                return FAILED
            return COMMITTED if self.version == version else ABORTED

    @property
    def loads_from_disk(self) -> bool:
        """Whether the sidecar can have its server load a checkpoint."""
        return pb.FEATURE_DISK_UPDATE in self.control.capabilities().features

    def checkpoint(self, content: Content) -> Path:
        """A model folder with these weights; made once for each content."""
        folder = self.workdir / "disk" / content_digest(content)
        if not folder.exists():
            tiny_model.save_checkpoint(folder, named_tensors(content))
        return folder

    def roles(self) -> dict[str, int]:
        """Every process that is to be looked at."""
        ranks = {f"rank_{rank.rank}": rank.pid for rank in self.ranks}
        return {"sidecar": self.sidecar.pid, **ranks, **engine_roles(self.engine.pid)}

    def helper_fds(self) -> dict[str, int]:
        """Trainers that each of the server's ranks has met in its life, by role."""
        return {f"scheduler_TP{rank}": lives for rank, lives in enumerate(self._lives_met)}

    # What is done to them.

    def signal_engine(self, number: signal.Signals) -> None:
        """To all of the server's processes."""
        for pid in self.engine.process.session_members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_engine(self) -> None:
        """As the kernel does when memory runs out; the requests in flight go with it."""
        self._killed_at = time.monotonic()
        self._left_behind = mapped_files(self.engine.process.session_members())
        self.served.outages.append((self._killed_at, float("inf")))
        self.signal_engine(signal.SIGKILL)

    def replace_dead_engine(self, step: int) -> None:
        """The same server again, with its checkpoint's weights, if it was killed."""
        if self._killed_at is None:
            return
        self.engine.stop()
        self._remove_what_it_left()
        self.engine = EngineProcess(self._config)
        self._lives_met = [1] * TP_SIZE
        # A request that was refused at the last moment may be noted down a little later.
        self.served.outages[-1] = (self._killed_at, time.monotonic() + 1.0)
        version = self.http.weight_version()
        self.served.published(version, "", self._killed_at, self._killed_at)
        self._killed_at = None
        wait_until(
            lambda: self.state not in ("ENGINE_UNREACHABLE", "PAUSED"), SETTLE_TIMEOUT_S, "the engine stayed unseen"
        )
        self.log.write("engine", step=step, version=version, state=self.state)
        self.wait_for_helpers()

    def _remove_what_it_left(self) -> None:
        """25 MB of SGLang's own, which nobody else removes once all its processes were killed."""
        for path in self._left_behind:
            path.unlink(missing_ok=True)

    def wait_for_helpers(self) -> None:
        """Torch's helper removes what a killed trainer left, once no server is connected to it any more."""
        wait_until(lambda: not torch_files(self.dead_rank_pids), HELPERS_TIMEOUT_S, "files of dead trainers stay")

    def signal_sidecar(self, number: signal.Signals) -> None:
        """To the sidecar."""
        os.kill(self.sidecar.pid, number)

    def restart_sidecar(self, step: int) -> None:
        """Another one on the same socket, once the first has ended."""
        assert self.sidecar.process.wait_exit(SETTLE_TIMEOUT_S), "the sidecar does not end"
        self.sidecar.stop()
        self.sidecar = SidecarProcess(self._sidecar_config())
        self.log.write("sidecar", step=step, state=self.wait_for_engine())

    def replace_dead_ranks(self, step: int) -> None:
        """New processes in the place of those that were killed."""
        dead = [rank for rank in self.ranks if rank.dead]
        for rank in dead:
            rank.retire()
            self._retired.append(rank)
            self.dead_rank_pids.append(rank.pid)
            self.ranks[rank.rank] = self._new_rank(rank.rank)
        for rank in dead:
            self.ranks[rank.rank].wait_ready()
            self.log.write("rank", step=step, rank=rank.rank)


def wait_until(happened: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    """Polls; an ``AssertionError`` with this sentence if it does not happen. A sidecar that is away may come back."""
    give_up = time.monotonic() + timeout_s
    while not _tried(happened):
        assert time.monotonic() < give_up, otherwise
        time.sleep(_POLL_S)


def _tried(happened: Callable[[], bool]) -> bool:
    try:
        return happened()
    except WeightSyncError:
        return False


@contextlib.contextmanager
def held(stop: Callable[[], None], go_on: Callable[[], None]) -> Iterator[None]:
    """Between a SIGSTOP and its SIGCONT, which comes whatever happens."""
    stop()
    try:
        yield
    finally:
        go_on()
