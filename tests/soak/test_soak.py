"""A thousand updates of random size and bucket count on a real server under traffic, with a fault every twenty.

WEIGHT_SYNC_SOAK_UPDATES   how many; 1000
WEIGHT_SYNC_SOAK_SEED      what is drawn; a new one, which the log and the progress name
WEIGHT_SYNC_SOAK_LOG       where the log goes; a temporary folder
"""

import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.soak import samples
from tests.soak.answers import complaints
from tests.soak.content import rank_checksums
from tests.soak.driver import Soak
from tests.soak.log import SoakLog, read
from tests.soak.prediction import READY, Expected, predict
from tests.soak.traffic import NUM_TOKENS, PROBE, Traffic, generating
from tests.soak.world import HELPERS_TIMEOUT_S, TP_SIZE, World, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.e2e, pytest.mark.timeout(4 * 3600)]

NUM_UPDATES = int(os.environ.get("WEIGHT_SYNC_SOAK_UPDATES", "1000"))
FAULT_EVERY = int(os.environ.get("WEIGHT_SYNC_SOAK_FAULT_EVERY", "20"))
SEED = int(os.environ.get("WEIGHT_SYNC_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
# What a process may hold more of in the last third of its life than in the first, and half of what any of its kind may
# hold more of than any other. A library's thread or an open HTTP connection comes and goes.
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "sidecar": {"own_fds": 2, "threads": 2, "rss_mb": 4},
    "rank": {"own_fds": 2, "threads": 2, "rss_mb": 10},
    "engine": {"own_fds": 3, "threads": 2, "rss_mb": 10},
    "scheduler": {"own_fds": 2, "threads": 2, "rss_mb": 25},
    "detokenizer": {"own_fds": 2, "threads": 2, "rss_mb": 5},
}


def test_a_thousand_updates_end_where_the_log_says_and_leave_nothing_behind(tmp_path: Path) -> None:
    log = SoakLog(Path(os.environ.get("WEIGHT_SYNC_SOAK_LOG", tmp_path / "soak.jsonl")))
    print(f"\nsoak: {NUM_UPDATES} updates, seed {SEED}, log {log.path}", file=sys.stderr, flush=True)
    # A Unix socket's path may have 107 bytes, which pytest's folders leave room for.
    with World(tmp_path, log) as world:
        with generating(world.engine.url) as traffic:
            Soak(world, log, seed=SEED, num_updates=NUM_UPDATES, fault_every=FAULT_EVERY).run()
        _check_traffic(traffic, world)
        _check_end(world, predict(log.path.read_text().splitlines()))
        pids = [*world.dead_rank_pids, *(rank.pid for rank in world.ranks)]
    wait_until(lambda: not samples.torch_files(pids), HELPERS_TIMEOUT_S, "files of torch stay in /dev/shm")
    print(f"soak: nothing of {len(pids)} trainer processes is left in /dev/shm", file=sys.stderr)
    _check_flat(log)


def _check_traffic(traffic: Traffic, world: World) -> None:
    crossing = sum(len(answer.versions) > 1 for answer in traffic.answers)
    compared = sum(answer.is_probe and bool(world.served.digest_of(answer)) for answer in traffic.answers)
    print(
        f"soak: {len(traffic.answers)} answers, {crossing} over more than one version, {compared} compared with "
        f"others of the same content; {len(traffic.failures)} requests died with their server",
        file=sys.stderr,
    )
    assert crossing, "updates that no request felt prove nothing"
    assert compared, "and so do answers that are compared with nothing"
    assert complaints(traffic.answers, traffic.failures, world.served) == []


def _check_end(world: World, predicted: Expected) -> None:
    """The engine is as the log alone says, and as if it had loaded the same from disk."""
    assert predicted.content is not None
    assert (world.state, predicted.state) == (READY, READY)
    assert world.version == world.http.weight_version() == predicted.version
    checksums, tokens = world.http.rank_checksums(), world.http.generate(PROBE, NUM_TOKENS)
    assert checksums == rank_checksums(predicted.content, TP_SIZE)
    world.http.load_from_disk(world.checkpoint(predicted.content))
    assert world.http.rank_checksums() == checksums
    assert world.http.generate(PROBE, NUM_TOKENS) == tokens


def _check_flat(log: SoakLog) -> None:
    taken = [process for line in log.lines if (found := read(line, "sample")) for process in found["processes"]]
    verdicts = list(samples.verdicts(taken, TOLERANCES))
    for one in verdicts:
        print(f"soak: {one}", file=sys.stderr)
    assert [one for one in verdicts if not one.flat] == []
