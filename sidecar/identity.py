"""Who makes the call that this task answers: the name that a client certificate proves, or nobody in particular.

Set once per call, by ``guard``; what a rank has delivered belongs to the name that brought it (``update``).
"""

from contextvars import ContextVar

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Empty: a caller without a certificate."""
