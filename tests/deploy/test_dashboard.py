"""The Grafana dashboard: it is provisioned as it is, asks for what the server tells, and no panel covers another."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from scripts import load_script

from hueshift.server.metrics import Metrics

PROJECT = Path(__file__).resolve().parents[2]
FILE = PROJECT / "deploy" / "grafana" / "hueshift.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
# Of Prometheus itself, of every process, of histograms and of hueshift_build_info.
OTHER_LABELS = {"job", "instance", "le", "version", "engine", "role"}


def metrics_of(text: str) -> set[str]:
    """Families by the names of their series."""
    return {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in re.findall(r"\bhueshift_[a-z_]+\b", text)}


def test_every_metric_exists() -> None:
    assert load_script("deploy/check.py").check_metric_names([FILE])


def test_every_label_is_one_of_its_metric() -> None:
    labels = {
        family._name: set(family._labelnames)
        for family in vars(Metrics(CollectorRegistry())).values()
        if hasattr(family, "_labelnames")
    }
    for query in QUERIES:
        named = {
            name for part in re.findall(r"\{([^}]*)\}", query) for name in re.findall(r"(\w+)(?:=~|!~|!=|=)", part)
        }
        named |= {name.strip() for part in re.findall(r"by \(([^)]*)\)", query) for name in part.split(",")}
        known = {label for name in metrics_of(query) for label in labels.get(name, set())}
        assert named - known - OTHER_LABELS == set(), query
        assert query.count("(") == query.count(")"), query


def test_legends_name_labels_that_are_left() -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            kept = re.findall(r"by \(([^)]*)\)", target["expr"])
            wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            # A series that is not summed keeps its server, and the stage of a start.
            left = {name.strip() for part in kept for name in part.split(",")} if kept else {"instance", "stage"}
            assert wanted <= left, target


def test_everything_that_is_alerted_on_or_told_to_be_watched_is_shown() -> None:
    shown = metrics_of(" ".join(QUERIES))
    rules = (PROJECT / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8")
    watched = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Watching")[2]
    for text in (rules, watched.partition("## Alerts")[0]):
        assert metrics_of(text) - shown == set()


def test_it_is_provisioned_as_it_is() -> None:
    # Dashboards exported for sharing ask for inputs that a provisioned one is never given.
    assert not {"__inputs", "__requires", "id"} & set(DASHBOARD)
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]
    sources = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    sources += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    sources += [note["datasource"] for note in DASHBOARD["annotations"]["list"]]
    assert {json.dumps(source) for source in sources} == {'{"type": "prometheus", "uid": "${datasource}"}'}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_a_place_of_its_own(panel: dict[str, Any]) -> None:
    place = panel["gridPos"]
    assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    assert panel["type"] == "row" or panel["targets"]
    assert [target["refId"] for target in panel.get("targets", ())] == [
        chr(ord("A") + n) for n in range(len(panel.get("targets", ())))
    ]


def test_no_two_panels_share_an_id_a_title_or_a_place() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    for one, two in combinations([panel["gridPos"] for panel in PANELS], 2):
        assert (
            one["x"] + one["w"] <= two["x"]
            or two["x"] + two["w"] <= one["x"]
            or one["y"] + one["h"] <= two["y"]
            or two["y"] + two["h"] <= one["y"]
        ), (one, two)
