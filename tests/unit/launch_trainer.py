"""A trainer that starts a process with a reaper, says which, and then goes in the way that it was told.

    python -m tests.unit.launch_trainer HOW FOLDER

HOW: "wait" (to be killed), "exec" another program, "fork" a child that lives on, "exit" without a goodbye, "goodbye"
with the process left alone, or "stop" it in good order. The process ignores SIGTERM, has a child, and has mapped
shared memory named sgl_shm_<FOLDER's name>.
"""

import json
import os
import sys
import time
from pathlib import Path

from adapter.launch import ManagedProcess, ReaperProcess

SERVER = """
import mmap, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 4096)
mapped = mmap.mmap(fd, 4096)
child = subprocess.Popen(["sleep", "1000"])
print("child", child.pid, flush=True)
child.wait()
"""
GRACE_S = 0.5


def main(how: str, folder: Path) -> None:
    """Its whole life."""
    run = folder / "run"
    run.mkdir()
    (run / "socket").touch()
    reaper = ReaperProcess(folder / "reaper.log")
    reaper.remove(run)
    reaper.remove_if_empty(folder)
    (folder / "empty").mkdir()
    reaper.remove_if_empty(folder / "empty")
    command = [sys.executable, "-c", SERVER, f"/dev/shm/sgl_shm_{folder.name}"]
    server = ManagedProcess(
        "the server", command, folder / "server.log", grace_s=GRACE_S, shm_prefixes=("sgl_shm_",), reaper=reaper
    )
    server.wait_until(lambda: "child" in server.log_text(), 30.0)
    told = {"leader": server.pid, "child": int(server.log_text().split()[1]), "reaper": reaper.pid}
    print(json.dumps(told), flush=True)
    go(how, server, reaper)


def go(how: str, server: ManagedProcess, reaper: ReaperProcess) -> None:
    """Leave the stage."""
    if how == "exec":
        os.execv("/bin/sleep", ["sleep", "1000"])
    if how == "fork" and os.fork() == 0:
        server.stop()  # a child that ends in good order takes nothing of its parent's along
        reaper.close()
        time.sleep(1000)
    if how == "stop":
        server.stop()
        reaper.close()
    if how == "goodbye":
        reaper.close()
    if how in ("wait", "fork"):
        time.sleep(1000)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
