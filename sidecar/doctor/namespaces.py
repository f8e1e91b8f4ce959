"""Whether trainer and engine see each other: the process that listens, its user, PID namespace and shared memory.

Only files of /proc are read. Invariant: an engine that is not seen leaves the checks that need its process skipped;
why it is not seen is told once, by ``process`` and, where another user or PID namespace explains it, by those.

Facts borrowed (proc(5), user_namespaces(7)): NSpid has one number for each PID namespace from the reader's down to the
process's own; /proc/net/tcp names the user of a listening socket, whoever reads it.
"""

import os
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from sidecar.config import MAX_SOCKET_PATH
from sidecar.doctor.finding import Check, Finding, fail, ok, skipped, warn
from sidecar.doctor.host import ROOT_USER, SELF, Host
from sidecar.doctor.situation import Situation

LISTENS = "0A"
FORWARDERS = ("docker-proxy", "rootlesskit", "slirp4netns", "pasta", "kubectl", "ssh", "socat", "haproxy", "nginx")
LOOPBACK = ("127.", "::1", "localhost")
SHM = "/dev/shm"  # noqa: S108 - looked at, not written to
UNSEEN = "the engine's process is not seen"
SAME_USER = "run trainer, sidecar and engine as one user"
IN_SIGHT = "run the doctor, as the trainer, as the engine's user and in its PID namespace"
SAME_PIDS = (
    "let them share a PID namespace: docker run --pid=container:ENGINE (or host), shareProcessNamespace in a pod"
)
TEMPORARY = ("TMPDIR", "TEMP", "TMP", "TEMPDIR")
SAME_TMP = "mount one {folder} in both, or set TMPDIR in both to a folder that they share"
SAME_SHM = "let them share /dev/shm: docker run --ipc=container:ENGINE (or host), in a pod one memory-backed emptyDir"


def process(situation: Situation) -> Iterable[Finding]:
    """Whether this host shows the process that listens at the engine's port."""
    engine, url = situation.engine, situation.options.engine_url
    if engine.pid:
        return [ok(Check.PROCESS, f"process {engine.pid} listens at the engine's port")]
    if engine.forwarder:
        reason = f"{engine.forwarder} listens at the engine's port and passes calls on: the engine itself is not seen"
        return [warn(Check.PROCESS, reason, "run the doctor where the server listens itself")]
    hostname = urlsplit(url).hostname or ""
    if not hostname.startswith(LOOPBACK):
        reason = f"{hostname} is no loopback address, so the engine's process is not looked for on this host"
        fix = "run the doctor, as each trainer rank, on the engine's host, with http://127.0.0.1:PORT"
        return [warn(Check.PROCESS, reason, fix)]
    if _port_users(situation):
        return [warn(Check.PROCESS, "somebody listens at the engine's port, but shows no process", IN_SIGHT)]
    fix = "run the doctor, as the trainer, on the engine's host and in its network namespace"
    return [warn(Check.PROCESS, "nobody is seen to listen at the engine's port", fix)]


def forwarder(host: Host, pid: str) -> str:
    """The command of that process, if it is one that passes connections on."""
    command = (host.text(pid, "comm") or "").strip() if pid else ""
    return command if command in FORWARDERS else ""


def _port_users(situation: Situation) -> set[int]:
    """The users of the sockets that listen at the engine's port, if it is on this host and is none of a forwarder's."""
    parts = urlsplit(situation.options.engine_url)
    if situation.engine.forwarder or not (parts.hostname or "").startswith(LOOPBACK):
        return set()
    port = parts.port or (443 if parts.scheme == "https" else 80)
    tables = [(situation.host.text("net", name) or "").splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return {int(row[7]) for row in rows if row[3] == LISTENS and int(row[1].rpartition(":")[2], 16) == port}


def user(situation: Situation) -> Iterable[Finding]:
    """Whether the engine may open what this user makes: shared memory is made for its owner alone (mode 0600)."""
    host, pid = situation.host, situation.engine.pid
    users = set(map(int, host.status(pid, "Uid")[1:2])) if pid else _port_users(situation)
    if not users:
        return [skipped(Check.USER, UNSEEN)]
    if host.uid in users:
        return [ok(Check.USER, f"user {host.uid} on both sides")]
    if users == {ROOT_USER}:
        return [ok(Check.USER, f"the engine is root's, which may open what user {host.uid} makes")]
    reason = f"the engine is user {min(users)}'s, this process user {host.uid}'s, whose memory it may not open"
    return [fail(Check.USER, reason, SAME_USER)]


def pid_namespace(situation: Situation) -> Iterable[Finding]:
    """Whether both are in one PID namespace; CUDA IPC fails between two."""
    if not situation.engine.on_cuda:
        return [skipped(Check.PID_NAMESPACE, "memory on the CPU is shared without it")]
    same = shares_pids(situation.host, situation.engine.pid)
    if same:
        return [ok(Check.PID_NAMESPACE, "one PID namespace")]
    if same is None and not _must_be_hidden(situation):
        return [skipped(Check.PID_NAMESPACE, UNSEEN)]
    return [
        fail(Check.PID_NAMESPACE, "the engine is in another PID namespace, where CUDA IPC does not open", SAME_PIDS)
    ]


def shares_pids(host: Host, pid: str) -> bool | None:
    """Whether that process is in this one's PID namespace; None if that is not seen."""
    ours, theirs = host.namespace(SELF, "pid"), host.namespace(pid, "pid") if pid else ""
    if ours and theirs:
        return ours == theirs
    depths = [len(host.status(each, "NSpid")) for each in (SELF, pid)] if pid else [0]
    return len(set(depths)) == 1 if all(depths) else None


def _must_be_hidden(situation: Situation) -> bool:
    """Whether the port is this user's (or anybody's, for root), though no such process is seen."""
    host = situation.host
    users = set() if situation.engine.pid else _port_users(situation)
    return bool(users) and (host.uid in users or host.uid == ROOT_USER)


def shm_view(situation: Situation) -> Iterable[Finding]:
    """Whether both have the same /dev/shm: torch keeps its reference counters there, or the tensors themselves."""
    return _same_folder(situation, Check.SHM_VIEW, SHM, SAME_SHM)


def cpu_sharing(situation: Situation) -> Iterable[Finding]:
    """Whether torch's ``file_system`` sharing can work, which an engine on the CPU needs."""
    if situation.engine.on_cuda:
        told = situation.engine.info
        return [skipped(Check.CPU_SHARING, "the engine is on GPUs" if told else "the engine has not said what it is")]
    return _cpu_sharing(situation, temporary_folder(situation.host))


def _cpu_sharing(situation: Situation, folder: str) -> Iterator[Finding]:
    socket = f"{folder}/torch-shm-dir-XXXXXX/manager.sock"
    if len(socket.encode()) > MAX_SOCKET_PATH:
        reason = f"torch's helper cannot listen below {folder}: a socket's path may have {MAX_SOCKET_PATH} bytes"
        yield fail(Check.CPU_SHARING, reason, "set TMPDIR to a shorter path, for trainer and engine alike")
    elif not os.access(situation.host.at(folder), os.W_OK | os.X_OK):
        reason = f"this user cannot write to the temporary folder {folder}, where torch's helper listens"
        yield fail(Check.CPU_SHARING, reason, "set TMPDIR to a folder of this user's, which the engine sees as well")
    else:
        yield from _same_folder(situation, Check.CPU_SHARING, folder, SAME_TMP.format(folder=folder))


def temporary_folder(host: Host) -> str:
    """Where torch makes its helper's socket (c10/util/tempfile.cpp)."""
    return next(filter(None, map(host.environ.get, TEMPORARY)), "/tmp").rstrip("/")  # noqa: S108 - torch's own default


def _same_folder(situation: Situation, check: Check, path: str, fix: str) -> Iterable[Finding]:
    """Whether both see the same folder at a path: the same device, and the same place on it."""
    host, pid = situation.host, situation.engine.pid
    if not pid:
        return [skipped(check, UNSEEN)]
    try:
        ours, theirs = host.at(path).stat(), host.seen_by(pid, path).stat()
    except PermissionError:
        return [warn(check, f"this user may not see what the engine has at {path}", SAME_USER)]
    except OSError as error:
        return [fail(check, f"{path} is not on both sides: {error.strerror}", fix)]
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        return [ok(check, f"{path} is the same on both sides")]
    return [fail(check, f"the engine has another {path} than this process, so neither finds the other's memory", fix)]
