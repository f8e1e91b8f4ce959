"""A host made of a temporary folder: what the kernel and the driver show of a trainer and an engine, to be spoiled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sidecar.doctor.finding import Check, Finding, Verdict
from sidecar.doctor.host import Host
from sidecar.doctor.situation import DoctorOptions, EngineSeen, Situation
from sidecar.engine.info import parse
from tests.unit.test_gpus import H100, INFORMATION

ENGINE = "4711"
URL = "http://127.0.0.1:30000"
PORT = 30000
USER = 1000
GPUS = tuple(f"{letter * 8}-5ad9-d3a4-0cda-31ff98e9d025" for letter in "ab")
PIDS, OTHER_PIDS = "pid:[4026531836]", "pid:[4026532999]"
NET_HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
NET_ROW = "   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {uid:5d}        0 1 1\n"
ROOMY = (1 << 30, 1 << 30)
"""Bytes of /dev/shm, all and free, in KiB."""

Look = Callable[[Situation], Iterable[Finding]]


@dataclass
class Planted:
    """A healthy host with two GPUs, one trainer and one engine, until something is planted."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    engine_pid: str = ENGINE
    uid: int = USER
    open_files: int = 65536
    shm: tuple[int, int] = ROOMY
    ahead_s: float = 0.0
    """By how much this host's clock is ahead."""

    def __post_init__(self) -> None:
        for folder in ("dev/shm", "tmp", "proc/net", "proc/sys/kernel/yama", "proc/driver/nvidia/gpus"):
            (self.root / folder).mkdir(parents=True)
        for number, uuid in enumerate(GPUS):
            self.gpu(number, uuid)
        for pid in ("self", self.engine_pid):
            self.process(pid)
        self.ptrace_scope(0)

    def gpu(self, minor: int, uuid: str) -> None:
        folder = self.root / f"proc/driver/nvidia/gpus/0000:0{minor}:00.0"
        folder.mkdir()
        text = INFORMATION.format(model=H100, uuid=uuid, bus=folder.name, minor=minor, excluded="No")
        (folder / "information").write_text(text)
        (self.root / f"dev/nvidia{minor}").touch()

    def process(self, pid: str) -> None:
        folder = self.root / "proc" / pid
        (folder / "ns").mkdir(parents=True)
        (folder / "root").symlink_to(self.root)
        (folder / "comm").write_text("python3\n")
        (folder / "limits").write_text("Max open files            65536                65536                files\n")
        (folder / "stat").write_text(f"{pid} (python3) S 1 1 1 0")
        self.started_with(pid, PATH="/usr/bin")
        self.pid_namespace(pid, PIDS)
        self.status(pid)

    def started_with(self, pid: str, **environ: str) -> None:
        text = "".join(f"{name}={value}\0" for name, value in environ.items())
        (self.root / "proc" / pid / "environ").write_text(text)

    def pid_namespace(self, pid: str, name: str) -> None:
        link = self.root / "proc" / pid / "ns/pid"
        link.unlink(missing_ok=True)
        link.symlink_to(name)

    def status(self, pid: str, uid: int = USER, pids: str = ENGINE, capabilities: int = 0) -> None:
        text = f"Name:\tpython3\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nNSpid:\t{pids}\nCapEff:\t{capabilities:016x}\n"
        (self.root / "proc" / pid / "status").write_text(text)

    def ptrace_scope(self, scope: int) -> None:
        (self.root / "proc/sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")

    def another_view(self, *folders: str) -> Path:
        """The engine gets a root folder of its own, with these folders in it."""
        view = self.root.parent / f"{self.root.name}-of-the-engine"
        for folder in folders:
            (view / folder).mkdir(parents=True)
        link = self.root / "proc" / self.engine_pid / "root"
        link.unlink()
        link.symlink_to(view)
        return view

    def listens(self, uid: int, port: int = PORT) -> None:
        """Somebody's socket, as everybody sees it."""
        (self.root / "proc/net/tcp").write_text(NET_HEAD + NET_ROW.format(port=port, uid=uid))

    def host(self, listener: str | None = None) -> Host:
        """``listener``: what is seen to listen; None: the engine."""
        total, free = self.shm
        statvfs = os.statvfs_result((1024, 1024, total, free, free, 0, 0, 0, 0, 255))
        seen = f"{self.engine_pid}/1" if listener is None else listener
        return Host(
            root=self.root,
            environ=self.environ,
            uid=self.uid,
            open_files=self.open_files,
            now=lambda: time.time() + self.ahead_s,
            statvfs=lambda _: statvfs,
            listener=lambda _: seen,
        )

    def situation(self, device: str = "cuda", seen: bool = True, **options: object) -> Situation:
        """What a check is given beside a healthy engine of two ranks on this host."""
        return Situation(
            _options(**options), self.host(), seen_engine({"device": device}, self.engine_pid if seen else "")
        )


def _options(**options: object) -> DoctorOptions:
    return DoctorOptions(**{"engine_url": URL, **options})  # type: ignore[arg-type]


def seen_engine(told: Mapping[str, object], pid: str = ENGINE, skew_s: float | None = 0.0) -> EngineSeen:
    """An engine of two ranks that has said what it is."""
    described = {"version": "0.5.23", "tp_size": 2, "base_gpu_id": 0, "gpu_id_step": 1, **told}
    process = f"{pid}/1" if pid else ""
    return EngineSeen(info=replace(parse(described), process=process), process=process, skew_s=skew_s)


def only(findings: Iterable[Finding], check: Check) -> Finding:
    """The one finding of that check."""
    (found,) = [finding for finding in findings if finding.check is check]
    return found


def assert_found(finding: Finding, verdict: Verdict, reason: str, fix: str) -> None:
    """A fault was found by name, with what to do."""
    assert finding.verdict is verdict, finding
    assert reason in finding.reason, finding
    assert fix in finding.fix, finding
