"""The processes that a weight sync needs: an SGLang server and the sidecar beside it.

Each runs as the leader of a session of its own, with its output in a log file. `stop` ends exactly the processes of
that session; a `ReaperProcess` does so if this process is killed before it can.

    with EngineProcess(EngineConfig(model_path=model, log_path=log)) as engine:
        with SidecarProcess(SidecarConfig(engine_url=engine.url, listen="unix:/tmp/s.sock", log_path=log2)):
            ...

Neither torch nor SGLang is imported here.
"""

from adapter.launch.engine import SERVER, EngineConfig, EngineProcess
from adapter.launch.ports import free_port
from adapter.launch.process import ManagedProcess, ProcessFacts
from adapter.launch.reaper_process import ReaperProcess
from adapter.launch.sidecar import SIDECAR, SidecarConfig, SidecarProcess, sidecar_is_serving

__all__ = [
    "SERVER",
    "SIDECAR",
    "EngineConfig",
    "EngineProcess",
    "ManagedProcess",
    "ProcessFacts",
    "ReaperProcess",
    "SidecarConfig",
    "SidecarProcess",
    "free_port",
    "sidecar_is_serving",
]
