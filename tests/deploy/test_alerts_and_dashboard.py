"""Alerts and dashboard: of metrics that the sidecar has, in PromQL that parses, with a way to follow."""

import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest

from sidecar.metrics import Metrics
from tests.deploy.files import ROOT, document

OF_PROMETHEUS = {"up"}
SUFFIXES = {
    "counter": ["_total"],
    "histogram": ["_bucket", "_sum", "_count"],
    "summary": ["_sum", "_count"],
    "info": ["_info"],
}


def rules() -> list[Any]:
    return [rule for group in document("prometheus/alerts.yaml")["groups"] for rule in group["rules"]]


def panels() -> list[Any]:
    return [panel for panel in document("grafana/dashboard.json")["panels"] if panel["type"] != "row"]


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    dashboard = document("grafana/dashboard.json")
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    yield from (one["expr"] for one in dashboard["annotations"]["list"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"].removeprefix("label_values(").rpartition(",")[0]


def metrics_of(query: str) -> set[str]:
    """The metrics that are asked for, in a query that parses."""
    text = str(promql_parser.parse(query.replace("$__rate_interval", "5m")))
    names = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", re.sub(r'"(?:[^"\\]|\\.)*"', "", text))
    return {name for name in names if name.startswith("weightsync_") or name in OF_PROMETHEUS}


def series() -> set[str]:
    return {
        family.name + suffix for family in Metrics().registry.collect() for suffix in SUFFIXES.get(family.type, [""])
    }


def test_every_query_parses_and_is_about_a_metric() -> None:
    assert all(metrics_of(query) for query in queries())


def test_every_metric_that_is_asked_for_is_one_that_the_sidecar_has() -> None:
    asked = set().union(*map(metrics_of, queries()))
    assert asked - OF_PROMETHEUS - series() == set()


@pytest.mark.parametrize("rule", rules(), ids=[rule["alert"] for rule in rules()])
def test_an_alert_says_what_is_the_matter_and_leads_to_what_to_do(rule: Any) -> None:
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    kebab = re.sub(r"(?<!^)(?=[A-Z])", "-", rule["alert"]).lower()
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == f"alert-{kebab}"
    assert f"\n### {anchor}\n" in (ROOT / page).read_text()


@pytest.mark.parametrize("name", [rule["alert"] for rule in rules()])
def test_an_alerts_own_tests_have_it_fire_and_keep_still(name: str) -> None:
    tests = document("prometheus/alerts_test.yaml")["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == name]
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}


def test_panels_have_ids_of_their_own_and_do_not_lie_over_each_other() -> None:
    everything = document("grafana/dashboard.json")["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_panel_says_what_it_shows() -> None:
    assert all(panel["description"] and panel["targets"] for panel in panels())
