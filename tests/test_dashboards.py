"""The dashboards load, and ask for nothing that is not published: every metric and label is in the catalogue."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from cluster.metric_catalogue import INSTRUMENTS, Kind

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "helm" / "prfaas" / "dashboards"
PATHS = sorted(FOLDER.glob("*.json"))
# What Prometheus itself puts on what it scrapes.
TARGET_LABELS = frozenset({"job", "instance"})
LABELS_OF: Mapping[str, frozenset[str]] = {
    series: frozenset(i.labels) | TARGET_LABELS | ({"le"} if series.endswith("_bucket") else set())
    for i in INSTRUMENTS
    for series in i.series
}
KIND_OF = {series: i.kind for i in INSTRUMENTS for series in i.series}
# Grafana puts values in for its variables before it asks.
VARIABLES = {"$__rate_interval": "1m", "$job": ".*"}
OF_COUNTERS = frozenset({"rate", "increase", "irate"})


def board(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def queries(dashboard: Mapping[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def parsed(query: str) -> promql.Expr:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return promql.parse(query)


def children(node: Any) -> list[Any]:
    match node:
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return [node.expr]
        case promql.BinaryExpr():
            return [node.lhs, node.rhs]
        case promql.Call():
            return list(node.args)
        case promql.MatrixSelector():
            return [node.vector_selector]
    return []


def complaints(query: str) -> list[str]:
    """What of a query is not published, or is used as what it is not."""
    said: list[str] = []
    _check(parsed(query), said, under="")
    return said


def _check(node: Any, said: list[str], under: str) -> frozenset[str]:
    """Complain of ``node``; the labels that its result may have. ``under``: the function right above it."""
    match node:
        case promql.VectorSelector():
            return _check_selector(node, said, under)
        case promql.NumberLiteral() | promql.StringLiteral():
            return frozenset()
        case promql.Call():
            labels = [_check(arg, said, node.func.name) for arg in node.args]
            found = frozenset().union(*labels)
            return found - {"le"} if node.func.name == "histogram_quantile" else found
        case promql.MatrixSelector():
            return _check(node.vector_selector, said, under)
        case promql.AggregateExpr():
            below = _check(node.expr, said, "")
            wanted = frozenset(node.modifier.labels) if node.modifier is not None else frozenset()
            said += [f"{label} is no label of what is summed up" for label in sorted(wanted - below)]
            return wanted
    found = [_check(child, said, under) for child in children(node)]
    return frozenset().union(*found)


def _check_selector(node: Any, said: list[str], under: str) -> frozenset[str]:
    known = LABELS_OF.get(node.name)
    if known is None:
        said.append(f"{node.name} is not in the catalogue")
        return frozenset()
    asked = {matcher.name for matcher in node.matchers.matchers}
    said += [f"{node.name} has no label {label}" for label in sorted(asked - known)]
    only_grows = KIND_OF[node.name] is not Kind.GAUGE
    if under in OF_COUNTERS and not only_grows:
        said.append(f"{node.name} is a gauge, {under} is for counters")
    return known


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_query_asks_for_what_is_published(path: Path) -> None:
    found = {query: said for query in queries(board(path)) if (said := complaints(query))}

    assert found == {}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_dashboard_has_what_grafana_loads_it_by(path: Path) -> None:
    dashboard = board(path)

    assert re.fullmatch(r"[a-z-]{1,40}", dashboard["uid"])
    assert dashboard["title"]
    assert isinstance(dashboard["schemaVersion"], int)
    assert {variable["name"] for variable in dashboard["templating"]["list"]} >= {"datasource"}
    assert set(dashboard["time"]) == {"from", "to"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= 24 - place["w"], panel["title"]
        assert place["y"] >= 0
        assert place["h"] >= 1
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs, panel["title"]
        assert len(refs) == len(set(refs))
        assert panel["fieldConfig"]["defaults"]["unit"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_no_two_panels_lie_on_each_other(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board(path)["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_dashboards_have_names_of_their_own() -> None:
    assert len(PATHS) >= 4
    for key in ("uid", "title"):
        names = [board(path)[key] for path in PATHS]
        assert len(names) == len(set(names))


def test_every_metric_is_on_a_dashboard() -> None:
    """What nobody looks at is either not worth publishing or missing there; what the variables ask counts."""
    text = " ".join(path.read_text(encoding="utf-8") for path in PATHS)

    assert [i.name for i in INSTRUMENTS if i.name not in text] == []


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("sum(prfaas_nothing_total)", "not in the catalogue"),
        ("prfaas_requests_total{tenant='a'}", "has no label tenant"),
        ("sum by (tenant) (rate(prfaas_requests_total[1m]))", "tenant is no label"),
        ("rate(prfaas_requests_inflight[1m])", "is a gauge"),
        ("prfaas_requests", "not in the catalogue"),
        ("histogram_quantile(0.9, sum by (le) (rate(prfaas_time_to_first_token_seconds_sum[1m])))", "le is no label"),
    ],
)
def test_a_query_that_asks_for_something_else_is_seen(query: str, complaint: str) -> None:
    assert any(complaint in said for said in complaints(query)), complaints(query)
