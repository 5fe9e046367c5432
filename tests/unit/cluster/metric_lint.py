"""The rules of ``promtool check metrics``, which no package of PyPI has, on what a registry collects.

After promlint's validations (github.com/prometheus/client_golang, prometheus/testutil/promlint/validations); the tests
run the tool itself, too, where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric

_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_TYPES = frozenset({"counter", "gauge", "histogram", "summary", "untyped", "unknown"})
# what is not a base unit |-> what is
_UNITS = {
    **dict.fromkeys(
        ("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks", "ms", "us", "ns", "sec"),
        "seconds",
    ),
    **dict.fromkeys(("kilobytes", "megabytes", "gigabytes", "kibibytes", "mebibytes", "gibibytes", "bits"), "bytes"),
    **dict.fromkeys(("kb", "mb", "gb", "kib", "mib", "gib"), "bytes"),
    **dict.fromkeys(("percent", "percents", "perc"), "ratio"),
}


def complaints(metrics: Iterable[Metric]) -> list[str]:
    """What is wrong with them, one line each."""
    seen: set[str] = set()
    found: list[str] = []
    for metric in metrics:
        found += (f"{metric.name}: {said}" for said in _of(metric))
        if metric.name in seen:
            found.append(f"{metric.name}: comes twice")
        seen.add(metric.name)
    return found


def _of(metric: Metric) -> Iterator[str]:
    name = metric.name
    words = name.split("_")
    if not metric.documentation.strip():
        yield "has no help text"
    if not _NAME.fullmatch(name):
        yield "must be lower case words joined by _ (a colon is for recording rules)"
    if name.endswith("_total"):
        yield "only counters end in _total, and the client library puts it there"
    if metric.type != "histogram" and name.endswith(("_bucket", "_count", "_sum")):
        yield "its name ends as a histogram's series do"
    if _TYPES & set(words):
        yield "has a metric type in its name"
    for word in words:
        if word in _UNITS:
            yield f"{word} is no base unit, {_UNITS[word]} is"
    for sample in metric.samples:
        for label in sample.labels:
            if not _NAME.fullmatch(label):
                yield f"label {label} must be lower case words joined by _"
            if label == "le" and metric.type != "histogram":
                yield "label le belongs to histograms"
