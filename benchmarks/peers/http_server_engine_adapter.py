"""SGLang's HttpServerEngineAdapter: every tensor its own handle, all in one POST, from one process.

Described by its source in SGLang's releases (srt/entrypoints/http_server_engine.py): the list of (name, tensor) is
serialised once per TP rank, in the one process that calls, and POSTed with no load_format. So with tp 2 the second
TP rank reads the first GPU, and the trainer's other rank has nothing to do.
"""

from benchmarks.peers import sglang_classes
from benchmarks.peers.surroundings import Engine, Measured, Place
from benchmarks.shapes import NamedTensors


def update(tensors: NamedTensors, place: Place, engine: Engine | None, measured: Measured) -> None:
    """On rank 0; the others return at once."""
    if engine is None:
        return
    with engine.held():
        with measured.phase("export"):
            entries = [sglang_classes.serialize_text(tensors) for _ in range(place.tp_size)]
        engine.load(entries, None)
