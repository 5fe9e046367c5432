"""The catalogue is the whole truth about /metrics, keeps Prometheus' conventions, and is what docs/metrics.md says."""

import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from cluster.metric_catalogue import INSTRUMENTS, LABELS, PREFIX, Kind, document
from tests.unit.cluster.full_metrics import full_metrics
from tests.unit.cluster.metric_lint import complaints

ROOT = Path(__file__).resolve().parents[3]


def test_what_is_published_is_what_the_catalogue_has():
    published = {m.name: m for m in full_metrics().registry.collect()}

    assert set(published) == {i.name for i in INSTRUMENTS}
    for i in INSTRUMENTS:
        metric = published[i.name]
        assert (metric.type, metric.documentation) == (i.kind.value, i.doc), i.name
        series = [s for s in metric.samples if not s.name.endswith("_created")]
        assert series, f"{i.name} has no sample in the fixture, so nobody has seen it"
        assert {s.name for s in series} == set(i.series)
        assert {tuple(sorted(set(s.labels) - {"le"})) for s in series} == {tuple(sorted(i.labels))}, i.name


def test_each_is_there_once_and_its_labels_are_explained():
    names = [i.name for i in INSTRUMENTS]

    assert len(names) == len(set(names))
    assert all(name.startswith(PREFIX) for name in names)
    assert {label for i in INSTRUMENTS for label in i.labels} == set(LABELS)
    assert all(
        (i.kind is Kind.HISTOGRAM) == bool(i.buckets) and list(i.buckets) == sorted(i.buckets) for i in INSTRUMENTS
    )


def test_the_lint_has_nothing_to_complain_of():
    assert complaints(full_metrics().registry.collect()) == []


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [
        (GaugeMetricFamily("a_milliseconds", "help", value=1), "base unit"),
        (GaugeMetricFamily("a_total", "help", value=1), "only counters"),
        (GaugeMetricFamily("a_count", "help", value=1), "histogram"),
        (GaugeMetricFamily("a_gauge", "help", value=1), "metric type"),
        (GaugeMetricFamily("aB", "help", value=1), "lower case"),
        (GaugeMetricFamily("a:b", "help", value=1), "lower case"),
        (GaugeMetricFamily("a_percent", "help", value=1), "ratio"),
        (CounterMetricFamily("a_kb", "help", value=1), "bytes"),
        (HistogramMetricFamily("a_seconds", " ", buckets=[("+Inf", 1)], sum_value=1), "no help"),
    ],
)
def test_the_lint_sees_what_breaks_its_rules(metric, complaint):
    assert any(complaint in said for said in complaints([metric])), complaints([metric])


def test_the_lint_sees_labels_and_repetitions():
    family = GaugeMetricFamily("a", "help", labels=("camelCase", "le"))
    family.add_metric(("x", "y"), 1)

    assert len(complaints([family, family])) == 5


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed here")
def test_promtool_agrees():
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=full_metrics().render(), capture_output=True, check=False
    )

    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "", "")


def test_the_page_is_what_the_catalogue_says():
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

    assert written == document(), "make it again: prfaas metrics > docs/metrics.md"
