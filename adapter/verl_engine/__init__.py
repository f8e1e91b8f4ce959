"""The drop-in for SGLang's ``VerlEngine``; see ``adapter.verl_engine.engine``."""

from adapter.verl_engine.engine import VerlEngine

__all__ = ["VerlEngine"]
