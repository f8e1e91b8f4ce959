"""The trainer's own trace, if it has OpenTelemetry: what a call carries so that the engine's spans join it.

Invariant: OpenTelemetry is neither required nor imported here; a trainer that uses it has imported it.
"""

import sys
from typing import Any

PROPAGATE = "opentelemetry.propagate"


def metadata() -> tuple[tuple[str, str], ...]:
    """GRPC metadata of the current span; empty without one."""
    propagate: Any = sys.modules.get(PROPAGATE)
    if propagate is None:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key, carrier[key]) for key in ("traceparent",) if key in carrier)
