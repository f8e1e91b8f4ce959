"""The process beside one SGLang server: collects weights from a trainer's ranks and loads them into the engine.

Invariant: nothing here imports torch or SGLang, and nothing here unpickles.

SGLang 0.5.16 and later can start it themselves (``--sidecar sidecar``): they import this package in a child
process and call ``main(argv)`` (srt/entrypoints/sidecar.py), which is why ``main`` is here.
"""

from collections.abc import Sequence

__version__ = "0.1.0"

__all__ = ["__version__", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see ``sidecar.cli.main``. Imported late so that the package itself costs nothing."""
    from sidecar.cli import main as cli_main

    return cli_main(argv)
