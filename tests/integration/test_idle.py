"""A sidecar that has nothing to do takes next to nothing.

Of a core, while it really idles; of memory, over an hour of looks and scrapes without the pauses between them.
"""

import gc
import time
import tracemalloc

import psutil

from sidecar.config import Timeouts
from sidecar.coordinator import Coordinator
from sidecar.engine.lora import LoraEngine
from sidecar.engine.watch import PERIOD_S, EngineWatch
from sidecar.metrics import Metrics
from tests.fakes import ScriptedEngine
from tests.integration.conftest import StartPair

IDLE_S = 10.0
SHARE_OF_A_CORE = 0.005
HOUR = int(3600 / PERIOD_S)
SCRAPE_EVERY = 15
GROWTH_BYTES = 64 << 10


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_an_idle_sidecar_takes_less_than_half_a_percent_of_a_core(start: StartPair) -> None:
    pair = start()
    pair.update("something to remember")
    time.sleep(1.0)
    before = cpu_s(pair.process.pid)
    time.sleep(IDLE_S)
    assert (cpu_s(pair.process.pid) - before) / IDLE_S < SHARE_OF_A_CORE


async def test_an_hour_of_looks_and_scrapes_leaves_nothing_in_memory() -> None:
    with ScriptedEngine(tp_size=2) as engine:
        client = LoraEngine(engine.url, Timeouts())
        coordinator = Coordinator(client, Timeouts())
        watch, metrics = EngineWatch(client, coordinator.engine_changed), Metrics()

        async def look(times: int) -> None:
            for number in range(times):
                await watch.look()
                engine.calls.clear()
                if number % SCRAPE_EVERY == 0:
                    metrics.exposition()

        await look(200)
        tracemalloc.start()
        try:
            gc.collect()
            before = tracemalloc.take_snapshot().filter_traces(OURS)
            await look(HOUR)
            gc.collect()
            after = tracemalloc.take_snapshot().filter_traces(OURS)
        finally:
            tracemalloc.stop()
        client.close()
    grown = sum(change.size_diff for change in after.compare_to(before, "filename"))
    assert grown < GROWTH_BYTES


OURS = [tracemalloc.Filter(True, f"*/{folder}/*") for folder in ("sidecar", "h11", "asyncio", "prometheus_client")]
