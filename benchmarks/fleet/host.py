"""One process with many engines, each with its sidecar: real ones, at a socket of their own, on one event loop.

    python -m benchmarks.fleet.host FOLDER NAME ... [--slow NAME --slow-ms NUMBER]

Listens at ``FOLDER/NAME.sock`` for each name, says so in one line, and ends with its standard input. Needs neither
torch nor SGLang. Invariant: what is told to stop is stopped in order, so no socket is left behind.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet.engine import LoopEngine
from benchmarks.fleet.open_files import allow_many
from sidecar.config import ServeConfig, UnixAddress
from sidecar.server import SidecarServer

SERVING = "serving"
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Pair:
    """An engine and its sidecar."""

    engine: LoopEngine
    sidecar: SidecarServer
    socket: Path

    @classmethod
    async def start(cls, socket: Path, slow_s: float) -> "Pair":
        """The engine serves; the sidecar does once it runs."""
        engine = await LoopEngine.start(slow_s)
        return cls(engine, SidecarServer(ServeConfig(engine_url=engine.url, listen=UnixAddress(socket))), socket)


async def serve(folder: Path, names: Sequence[str], slow: str, slow_s: float) -> None:
    """Until standard input ends, or a signal comes."""
    pairs = [await Pair.start(folder / f"{name}.sock", slow_s if name == slow else 0.0) for name in names]
    async with asyncio.TaskGroup() as running:
        for pair in pairs:
            running.create_task(pair.sidecar.run())
        while not all(pair.socket.exists() for pair in pairs):  # noqa: ASYNC110 - a sidecar tells nobody
            await asyncio.sleep(POLL_S)
        print(SERVING, flush=True)
        await _told_to_end()
        for pair in pairs:
            pair.sidecar.stop()
    for pair in pairs:
        pair.engine.close()


async def _told_to_end() -> None:
    """In place of the sidecars' own signal handlers, of which the last one's alone would be left."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    loop.remove_reader(sys.stdin.fileno())


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--slow", default="")
    parser.add_argument("--slow-ms", type=float, default=0.0)
    options = parser.parse_args()
    allow_many()
    asyncio.run(serve(options.folder, options.names, options.slow, options.slow_ms / 1e3))


if __name__ == "__main__":
    main()
