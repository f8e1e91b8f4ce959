"""A real SGLang on the CPU under traffic, a sidecar, and real trainer ranks with torch; each can be killed.

    ranks -> sidecar -> holding proxy -> SGLang <- traffic

Invariant: between two cells all of it is healthy, the engine serves one seed's weights with the checksums that this
seed gave at first, and nobody holds memory of a living rank.
"""

import contextlib
import itertools
import os
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path

import grpc
import requests

from adapter.demo import tiny_model
from adapter.demo.cpu_engine import cpu_engine
from adapter.demo.engine_http import EngineHttp, RankChecksums
from adapter.launch import EngineProcess, SidecarConfig, SidecarProcess
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.faults import content
from tests.faults.holding_proxy import HoldingProxy
from tests.faults.rank import OPTIONS
from tests.faults.ranks import SHARED_MEMORY, RankProcess
from tests.faults.rig import ASK_S, wait_until
from tests.faults.torch_rank import RealJob
from tests.faults.traffic import Traffic

SEEDS = (1, 2)
COLLECT_S, BUCKET_S = 20, 5
"""--collect-timeout and --bucket-timeout, on a busy machine."""


class RealRig:
    """One server's stack, whose server is killed ``num_kills`` times."""

    def __init__(self, workdir: Path, tp_size: int, num_kills: int = 0) -> None:
        self.workdir = workdir
        self.tp_size = tp_size
        model = tiny_model.write_config(workdir / "model")
        # What is cached, or batched, is rounded in other ways: in bfloat16 that turns a token now and then.
        self._config = cpu_engine(workdir, model, tp_size=tp_size, extra_args=("--dtype", "float32"))
        self._num_spares = num_kills
        self.ranks: list[RankProcess] = []
        self._seeds = itertools.cycle(SEEDS)
        self._versions = itertools.count(1)
        self.seed = 0
        """Whose weights the newest update has."""
        self.version = content.CHECKPOINT_VERSION
        """The last one that was committed."""
        self._tokens: dict[str, list[int]] = {}
        """By version."""
        self._tokens_of: dict[int, list[int]] = {}
        self._checksums: dict[int, RankChecksums] = {}
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._learn()
            self.traffic = Traffic(self.engine.url, content.PROMPT, content.NUM_TOKENS)
            stack.callback(self.traffic.end)
            self._stack = stack.pop_all()

    def _open(self, stack: contextlib.ExitStack) -> None:
        stack.callback(self._end_ranks)
        self.ranks.extend(self._start_rank(rank) for rank in range(self.tp_size))
        self._spare = self._start_rank(self.tp_size - 1)
        """In the place of the last rank, should that be killed: importing torch takes seconds."""
        self._starting = stack.enter_context(ThreadPoolExecutor(1))
        self.engine = EngineProcess(self._config)
        stack.callback(self._end_engine)
        self._start_spare_engine()
        self.http = EngineHttp(self.engine.url)
        self.proxy = stack.enter_context(contextlib.closing(HoldingProxy(self.engine.url)))
        self.start_sidecar()
        stack.callback(self._end_sidecar)
        channel = stack.enter_context(grpc.insecure_channel(self._listen, options=OPTIONS))
        self._rpc = pb_grpc.WeightSyncServiceStub(channel)
        for rank in self.ranks:
            rank.wait("ready")

    def _learn(self) -> None:
        """What each seed's weights answer, and their checksums."""
        self._learn_checkpoint()
        for _ in SEEDS:
            self.update()
            self._tokens_of[self.seed] = self._tokens[self.version] = self._ask()
            self._checksums[self.seed] = self.http.rank_checksums()

    def close(self) -> None:
        """End all of it."""
        self._stack.close()
        self.traffic.join()

    def _end_engine(self) -> None:
        self.engine.stop()
        if self._spare_engine:
            self._spare_engine.result().stop()

    def _end_sidecar(self) -> None:
        self.sidecar.stop()

    def _end_ranks(self) -> None:
        for rank in [*self.ranks, self._spare]:
            rank.close()

    @property
    def _listen(self) -> str:
        return f"unix:{self.workdir / 's.sock'}"

    # Parts.

    def _start_rank(self, rank: int) -> RankProcess:
        log_path = self.workdir / f"rank{rank}.log"
        return RankProcess("tests.faults.torch_rank", rank, log_path, target=self._listen, tp_size=self.tp_size)

    def replace_dead_rank(self) -> None:
        """Another process in the place of the one that was killed."""
        last = self.ranks[-1]
        if last.dead:
            last.close()
            self.ranks[-1], self._spare = self._spare, self._start_rank(last.rank)
            self.ranks[-1].wait("ready")

    def start_sidecar(self) -> None:
        """The first, or a successor."""
        args = ("--collect-timeout", str(COLLECT_S), "--bucket-timeout", str(BUCKET_S))
        log_path = self.workdir / "sidecar.log"
        self.sidecar = SidecarProcess(
            SidecarConfig(engine_url=self.proxy.url, listen=self._listen, log_path=log_path, args=args, grace_s=0.0)
        )

    def kill_sidecar(self) -> None:
        """SIGKILL, and wait for the end."""
        os.kill(self.sidecar.pid, signal.SIGKILL)
        assert self.sidecar.process.wait_exit(ASK_S)
        self.sidecar.stop()

    def _start_spare_engine(self) -> None:
        """For the next kill: a start takes long, and leaves a core idle."""
        self._spare_engine = self._starting.submit(EngineProcess, self._config) if self._num_spares else None
        self._num_spares = max(0, self._num_spares - 1)

    def kill_engine(self) -> None:
        """SIGKILL to all of its processes at once, as the kernel's OOM killer or a container's end does."""
        members = self.engine.process.session_members()
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.engine.process.wait_exit(ASK_S)
        self.bury_engine(members)

    def bury_engine(self, members: list[int]) -> None:
        """What remains once it is dead: its port refuses, and its own files are removed."""
        self.proxy.die()
        self.engine.stop()
        for pid in members:
            for file in SHARED_MEMORY.glob(f"sgl_shm_*_{pid}_*"):
                file.unlink(missing_ok=True)

    def replace_engine(self) -> None:
        """Another server, which the sidecar takes for another life of the one that it knows."""
        assert self._spare_engine is not None
        self.engine = self._spare_engine.result()
        self._start_spare_engine()
        self.http = EngineHttp(self.engine.url)
        self.traffic.url = self.engine.url
        self._learn_checkpoint()
        self.proxy.revive(self.engine.url)
        wait_until(lambda: self.state() == "UNSYNCED", "the restart to be seen")

    # Asking.

    def status(self) -> pb.GetStatusResponse:
        return self._rpc.GetStatus(pb.GetStatusRequest(), timeout=ASK_S, wait_for_ready=True)

    def state(self) -> str:
        """The sidecar's, in one word."""
        return pb.SidecarState.Name(self.status().state).removeprefix("SIDECAR_STATE_")

    def outcome(self, update_id: str) -> str:
        """How an update ended."""
        outcome = self._rpc.GetUpdate(pb.GetUpdateRequest(update_id=update_id), timeout=ASK_S).outcome
        return pb.UpdateState.Name(outcome.state).removeprefix("UPDATE_STATE_")

    def is_held(self) -> bool:
        """Whether the engine takes no requests."""
        with requests.Session() as session:
            session.trust_env = False
            answer = session.get(f"{self.engine.url}/ready", timeout=ASK_S)
        return answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE

    def _ask(self) -> list[int]:
        return self.http.generate(content.PROMPT, content.NUM_TOKENS)

    def _learn_checkpoint(self) -> None:
        """The random weights that a server starts with are others each time."""
        self._tokens[content.CHECKPOINT_VERSION] = self._ask()

    # Updates.

    def next_job(self, *, verify: bool = False) -> RealJob:
        """Another version, with other weights than the last."""
        self.seed = next(self._seeds)
        version = str(next(self._versions))
        if self.seed in self._tokens_of:
            self._tokens[version] = self._tokens_of[self.seed]
        return RealJob(seed=self.seed, version=version, verify=verify)

    def update(self) -> None:
        """A complete, healthy update."""
        job = self.next_job()
        for rank in self.ranks:
            rank.start(asdict(job))
        done = [rank.wait("done") for rank in self.ranks]
        assert [one["error"] for one in done] == [""] * self.tp_size, done
        assert [one["unreleased_bytes"] for one in done] == [0] * self.tp_size
        self.version = job.version

    def check_healthy(self) -> None:
        """READY, the last seed's weights by checksum and by every answer, and no memory is held."""
        wait_until(lambda: self.state() == "READY", "a ready sidecar")
        assert self.http.weight_version() == self.version
        assert self.http.rank_checksums() == self._checksums[self.seed]
        self.traffic.wait_for(self.version)
        self.traffic.check(self._tokens)
        for rank in self.ranks:
            assert [_count(file) for file in rank.memory()] == [1] * len(rank.memory())
        assert "a defect in the sidecar" not in (self.workdir / "sidecar.log").read_text()

    def check_against_disk(self) -> None:
        """Each seed's checksums and answers are those of a checkpoint that SGLang itself has loaded."""
        for seed in SEEDS:
            self._load_from_disk(seed)
            self.check_healthy()

    def _load_from_disk(self, seed: int) -> None:
        checkpoint = tiny_model.save_checkpoint(self.workdir / f"disk-{seed}", tiny_model.random_weights(seed))
        version = str(next(self._versions))
        self._tokens[version] = self._tokens_of[seed]
        request = pb.UpdateWeightsFromDiskRequest(update_id=version, weight_version=version, model_path=str(checkpoint))
        self._rpc.UpdateWeightsFromDisk(request, timeout=ASK_S)
        self.seed, self.version = seed, version


def _count(file: Path) -> int:
    """Holders of one piece of shared memory, as torch counts them."""
    return int(struct.unpack("i", file.read_bytes()[:4])[0])
