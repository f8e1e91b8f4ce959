"""Everything that a cell needs, kept from cell to cell: a scripted engine under traffic, a sidecar, two ranks.

    ranks  --wires-->  sidecar process  --HTTP-->  scripted engine  <--HTTP--  traffic

Only what a cell has killed is started again. Invariant: between two cells all of it is healthy and idle, the engine
serves the version of the last complete update, and nothing is held in shared memory.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import grpc
import psutil

from adapter.launch import SidecarConfig, SidecarProcess
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.fakes import ScriptedEngine
from tests.faults import content
from tests.faults.content import Loaded
from tests.faults.rank import OPTIONS, Job
from tests.faults.ranks import RankProcess
from tests.faults.traffic import Traffic
from tests.faults.wires import Wire

ASK_S = 20.0
SPARE_FDS, SPARE_THREADS = 8, 8
"""What gRPC and asyncio's pool may open as they need it, up to bounds of their own; a cell that leaks one shows."""


class Rig:
    """One release's, with one sidecar's settings."""

    def __init__(self, folder: Path, release: str, sidecar_args: tuple[str, ...]) -> None:
        self.folder = folder
        self._args = sidecar_args
        self._socket = folder / "sidecar.sock"
        self._log = folder / "sidecar.log"
        self.ranks: list[RankProcess] = []
        self.version = content.CHECKPOINT_VERSION
        """The last one that was committed."""
        self._complete = {self.version: content.loaded_by(self.version)}
        self._number = 0
        with contextlib.ExitStack() as stack:
            self._open(stack, release)
            self._stack = stack.pop_all()

    def _open(self, stack: contextlib.ExitStack, release: str) -> None:
        stack.callback(self._join_traffic)  # a request that the engine holds ends with the engine
        self.engine = stack.enter_context(ScriptedEngine(release, content.TP_SIZE))
        self.traffic = Traffic(self.engine.url, content.PROMPT, content.NUM_TOKENS)
        stack.callback(self.traffic.end)
        stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX))).bind(str(self._manager))
        self.wires = [
            stack.enter_context(contextlib.closing(Wire(self.folder / f"rank{rank}.sock", self._socket)))
            for rank in range(content.TP_SIZE)
        ]
        stack.callback(self._end_ranks)
        self.ranks.extend(self._start_rank(rank) for rank in range(content.TP_SIZE))
        self.start_sidecar()
        stack.callback(self._end_sidecar)
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{self._socket}", options=OPTIONS))
        self._rpc = pb_grpc.WeightSyncServiceStub(channel)
        for rank in self.ranks:
            rank.wait("ready")

    def close(self) -> None:
        """End all of it."""
        self.engine.release()
        self._stack.close()

    def _join_traffic(self) -> None:
        self.traffic.join()

    def _end_ranks(self) -> None:
        for rank in self.ranks:
            rank.close()

    def _end_sidecar(self) -> None:
        self.continue_sidecar()
        self.sidecar.stop()

    # Parts.

    @property
    def _manager(self) -> Path:
        """Where torch's shared-memory manager would listen."""
        return self.folder / "manager.sock"

    def _start_rank(self, rank: int) -> RankProcess:
        log_path, target = self.folder / f"rank{rank}.log", f"unix:{self.wires[rank].path}"
        return RankProcess("tests.faults.rank", rank, log_path, target=target, manager=self._manager)

    def replace_dead_ranks(self) -> None:
        """Another process for each that was killed."""
        for number, rank in enumerate(self.ranks):
            if rank.dead:
                rank.close()
                self.ranks[number] = self._start_rank(number)
                self.ranks[number].wait("ready")

    def start_sidecar(self) -> None:
        """The first, or a successor."""
        listen = f"unix:{self._socket}"
        self.sidecar = SidecarProcess(
            SidecarConfig(engine_url=self.engine.url, listen=listen, log_path=self._log, args=self._args, grace_s=0.0)
        )
        self._baseline: tuple[int, int] | None = None

    def kill_sidecar(self) -> None:
        """SIGKILL, and wait for the end."""
        os.kill(self.sidecar.pid, signal.SIGKILL)
        assert self.sidecar.process.wait_exit(ASK_S)
        self.sidecar.stop()

    def stop_sidecar(self) -> None:
        """SIGSTOP."""
        os.kill(self.sidecar.pid, signal.SIGSTOP)

    def continue_sidecar(self) -> None:
        """SIGCONT; nothing to one that runs or is dead."""
        if not self.sidecar.process.has_exited():
            os.kill(self.sidecar.pid, signal.SIGCONT)

    def restart_engine(self) -> None:
        """Another life, with its checkpoint, and the sidecar knows it."""
        self.engine.restart()
        wait_until(lambda: self.state() == "UNSYNCED", "the restart to be seen")

    # Asking the sidecar.

    def status(self) -> pb.GetStatusResponse:
        return self._rpc.GetStatus(pb.GetStatusRequest(), timeout=ASK_S, wait_for_ready=True)

    def state(self) -> str:
        """In one word."""
        return pb.SidecarState.Name(self.status().state).removeprefix("SIDECAR_STATE_")

    def outcome(self, update_id: str) -> pb.UpdateOutcome:
        return self._rpc.GetUpdate(pb.GetUpdateRequest(update_id=update_id), timeout=ASK_S).outcome

    # Updates.

    def next_version(self) -> str:
        """One that the engine has not had; what it is made of is known from now on."""
        self._number += 1
        version = str(self._number)
        self._complete[version] = content.loaded_by(version)
        return version

    def loaded_by(self, version: str) -> Loaded:
        """What an engine holds that holds all of ``version`` and nothing else."""
        return self._complete[version]

    def update(self) -> None:
        """A complete, healthy update; the engine serves it when this returns."""
        version = self.next_version()
        job = Job(update_id=f"heals-{version}", version=version)
        for rank in self.ranks:
            rank.start(asdict(job))
        assert [rank.wait("done")["saw"] for rank in self.ranks] == ["COMMITTED"] * content.TP_SIZE
        self.version = version

    def update_from_disk(self) -> None:
        """The same without a trainer."""
        version = self.next_version()
        checkpoint = self.folder / f"checkpoint-{version}"
        checkpoint.mkdir()
        self._complete[version] = content.loaded_from_disk(str(checkpoint))
        request = pb.UpdateWeightsFromDiskRequest(
            update_id=f"heals-{version}", weight_version=version, model_path=str(checkpoint)
        )
        self._rpc.UpdateWeightsFromDisk(request, timeout=ASK_S)
        self.version = version
        self._check_serving()

    # What must hold between two cells.

    def check_healthy(self) -> None:
        """READY, generating with the last version and nothing else, no memory held, no file or thread too many."""
        self._check_serving()
        self.traffic.check({version: content.tokens_of(loaded) for version, loaded in self._complete.items()})
        self._check_memory()
        self._check_size()
        log = self._log.read_text()
        assert "a defect in the sidecar" not in log
        assert "Traceback" not in log

    def _check_serving(self) -> None:
        wait_until(lambda: self.state() == "READY", "a ready sidecar")
        assert not self.status().HasField("current_update")
        assert (self.engine.paused, self.engine.session_open) == (False, False)
        assert self.engine.weight_version == self.version
        assert self.engine.loaded == self.loaded_by(self.version)
        self.traffic.wait_for(self.version)

    def _check_memory(self) -> None:
        for rank in self.ranks:
            counts = rank.settle()
            assert counts == [1] * len(counts), f"rank {rank.rank}: memory is held: {counts}"
            rank.tell("forget")

    def _check_size(self) -> None:
        """File descriptors and threads of the sidecar do not grow over its life."""
        process = psutil.Process(self.sidecar.pid)
        fds, threads = process.num_fds(), process.num_threads()
        self._baseline = self._baseline or (fds, threads)
        assert fds <= self._baseline[0] + SPARE_FDS, f"file descriptors grow: {self._baseline[0]} -> {fds}"
        assert threads <= self._baseline[1] + SPARE_THREADS, f"threads grow: {self._baseline[1]} -> {threads}"


def wait_until(happened: Callable[[], bool], what: str = "the phase") -> None:
    """Look until it did."""
    give_up = time.monotonic() + ASK_S
    while not happened():
        assert time.monotonic() < give_up, f"waited {ASK_S:g} s for {what}"
        time.sleep(0.01)
