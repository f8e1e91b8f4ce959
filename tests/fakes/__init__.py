"""Stand-ins that behave: no mock accepts what the real thing would refuse."""

from tests.fakes.calls import Call
from tests.fakes.faults import ANY_PATH, Fault
from tests.fakes.scripted_engine import FOREVER, ScriptedEngine
from tests.fakes.shared_memory import SharedFile

__all__ = ["ANY_PATH", "FOREVER", "Call", "Fault", "ScriptedEngine", "SharedFile"]
