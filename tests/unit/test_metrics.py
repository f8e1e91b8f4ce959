"""What a scraper sees: every family at once, values of now, and no label that a trainer chooses."""

from dataclasses import dataclass, replace
from math import isnan

import pytest

from sidecar.engine.info import EngineInfo, parse
from sidecar.errors import Reason, UpdateConflict
from sidecar.header import Header, PauseMode
from sidecar.manifest import BucketSpec, Manifest
from sidecar.metrics import DEFECT, Metrics
from sidecar.standing import SidecarState
from sidecar.update import LoadPath, Phase, Update, UpdateState

FAMILIES = {
    "weightsync_updates", "weightsync_update_seconds", "weightsync_phase_seconds", "weightsync_pause_seconds",
    "weightsync_rank_wait_seconds", "weightsync_loaded_bytes", "weightsync_buckets", "weightsync_refusals",
    "weightsync_load_path", "weightsync_state", "weightsync_ready", "weightsync_engine_reachable",
    "weightsync_engine_epoch", "weightsync_weight_version", "weightsync_update_in_hand_seconds",
    "weightsync_last_commit_timestamp_seconds", "weightsync_info", "weightsync_calls", "weightsync_open_calls",
}  # fmt: skip
MANIFEST = Manifest(tuple(BucketSpec(size, ()) for size in (100, 28)))
HEADER = Header(update_id="u", weight_version="7", rank=0, tp_size=2)


@dataclass
class Now:
    """What stands."""

    state: SidecarState = SidecarState.READY
    ready: bool = True
    engine: EngineInfo | None = None
    epoch: int = 3
    weight_version: str = "41"
    in_hand_s: float = 0.0


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"weightsync_{name}", labels)


def committed(header: Header = HEADER) -> Update:
    update = Update(header, MANIFEST, "d", started=10.0, state=UpdateState.APPLYING)
    for rank, joined_at in enumerate((10.0, 10.5)):
        update.join(rank).joined_at = joined_at
    update.phase_seconds = {Phase.COLLECT: 0.5, Phase.PAUSE: 0.1, Phase.LOAD: 1.0}
    update.num_loaded, update.held_s, update.ended_at = 2, 1.25, 12.0
    update.loaded_by(LoadPath.REPLAYED)
    update.end(UpdateState.COMMITTED)
    return update


def test_every_family_is_there_from_the_beginning() -> None:
    assert {family.name for family in Metrics().registry.collect()} == FAMILIES


def test_a_committed_update_is_counted_whole() -> None:
    metrics = Metrics()
    metrics.ended(committed())
    assert value(metrics, "updates_total", outcome="committed") == 1
    assert value(metrics, "update_seconds_sum") == 2.0
    assert value(metrics, "phase_seconds_sum", phase="load") == 1.0
    assert value(metrics, "pause_seconds_sum") == 1.25
    assert [value(metrics, "rank_wait_seconds_sum", rank=rank) for rank in "01"] == [0.0, 0.5]
    assert (value(metrics, "buckets_total"), value(metrics, "loaded_bytes_total")) == (2, 256)
    assert value(metrics, "load_path_total", path="replayed") == 1
    assert (value(metrics, "last_commit_timestamp_seconds") or 0) > 0


def test_an_aborted_update_loads_nothing_and_holds_nothing() -> None:
    metrics = Metrics()
    update = Update(HEADER, MANIFEST, "d", started=10.0, ended_at=11.0)
    update.end(UpdateState.ABORTED, UpdateConflict(Reason.RANKS_DIFFER, "they differ"))
    metrics.ended(update)
    assert value(metrics, "updates_total", outcome="aborted") == 1
    assert [value(metrics, name) for name in ("buckets_total", "pause_seconds_count")] == [0, 0]
    assert value(metrics, "last_commit_timestamp_seconds") == 0
    assert value(metrics, "load_path_total", path="stock") == 0


def test_nothing_is_held_in_pause_mode_none() -> None:
    metrics = Metrics()
    update = committed(replace(HEADER, pause_mode=PauseMode.NONE))
    update.held_s = None
    metrics.ended(update)
    assert value(metrics, "pause_seconds_count") == 0


def test_ranks_from_64_on_share_a_label() -> None:
    metrics = Metrics()
    update = committed()
    for rank in (63, 64, 4711):
        update.deliveries[rank] = update.deliveries[0]
    metrics.ended(update)
    assert value(metrics, "rank_wait_seconds_count", rank="63") == 1
    assert value(metrics, "rank_wait_seconds_count", rank="64+") == 2
    assert value(metrics, "rank_wait_seconds_count", rank="64") is None


def test_calls_and_refusals_have_labels_of_the_protocol_only() -> None:
    metrics = Metrics()
    for method, reason in (("UpdateWeights", str(Reason.RANKS_DIFFER)), ("Check", "what a trainer says")):
        metrics.call_began()
        metrics.call_began()
        metrics.call_ended(method, "ABORTED", reason)
    assert value(metrics, "open_calls") == 2
    assert value(metrics, "calls_total", method="UpdateWeights", code="ABORTED") == 1
    assert value(metrics, "calls_total", method="other", code="ABORTED") == 1
    assert value(metrics, "refusals_total", reason="RANKS_DIFFER") == 1
    assert value(metrics, "refusals_total", reason=DEFECT) == 1
    series = [
        sample.labels["reason"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "weightsync_refusals_total"
    ]
    assert sorted(series) == sorted([*map(str, Reason), DEFECT])


def test_what_stands_is_read_at_each_scrape() -> None:
    metrics, now = Metrics(), Now(engine=parse({"version": "0.5.23"}))
    metrics.watch(now)
    assert [value(metrics, name) for name in ("ready", "engine_reachable", "engine_epoch", "weight_version")] == [
        1, 1, 3, 41
    ]  # fmt: skip
    now.state, now.ready, now.engine, now.in_hand_s = SidecarState.APPLYING, False, None, 2.5
    assert [value(metrics, name) for name in ("ready", "engine_reachable", "update_in_hand_seconds")] == [0, 0, 2.5]
    states = {state.name.lower(): value(metrics, "state", state=state.name.lower()) for state in SidecarState}
    assert [name for name, set_ in states.items() if set_] == ["applying"]
    assert len(states) == len(SidecarState)


@pytest.mark.parametrize("version", ["", "step 7", "٣", "-1", "1e3", "9" * 40])
def test_a_version_that_is_no_number_is_none(version: str) -> None:
    metrics = Metrics()
    metrics.watch(Now(weight_version=version))
    assert isnan(value(metrics, "weight_version") or 0.0)


def test_the_exposition_holds_no_second_series_of_when_a_counter_was_made() -> None:
    text = Metrics().exposition().decode()
    assert "_created" not in text
    assert 'weightsync_info{dialect="",engine_version="",sidecar_version="' in text
