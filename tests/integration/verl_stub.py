"""A stand-in for ``python -m sglang.launch_server``: the scripted engine, as a process, within a second.

Invariant: it takes the command line that SGLang takes, as far as it looks at it, and ends at SIGTERM as SGLang does.
"""

import os
from pathlib import Path
from typing import Any

from adapter.verl_engine import VerlEngine

_REPOSITORY = Path(__file__).parents[2]
_STUB = """
import argparse, json, os, signal, sys
from tests.fakes import ScriptedEngine

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for every thread: the main one waits for it
print("started with", json.dumps(sys.argv[1:]), flush=True)
print("environment", json.dumps(dict(os.environ)), flush=True)
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--tp", type=int)
parser.add_argument("--behave", default="well")
options = parser.parse_known_args()[0]
if options.behave == "hang":
    signal.sigwait({signal.SIGTERM})
    sys.exit()
if options.behave == "fail":
    raise SystemExit("this model does not fit")
with ScriptedEngine(tp_size=options.tp, port=options.port) as engine:
    signal.sigwait({signal.SIGTERM})
print("ended in good order", flush=True)
"""


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Of a VerlEngine that starts the stand-in."""
    package = folder / "stub" / "sglang"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(_STUB)
    return {"model_path": "a/model", "pythonpath": [str(package.parent), str(_REPOSITORY)], **more}


def described(engine: VerlEngine) -> dict[str, Any]:
    """What the engine has started, and who did."""
    names = ("server_url", "sidecar_target", "server_log", "sidecar_log")
    return {"trainer": os.getpid(), **{name: getattr(engine, name) for name in names}}
