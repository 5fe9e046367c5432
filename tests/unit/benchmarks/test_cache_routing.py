"""Which part of a trace is played, and where a prompt goes without knowledge."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.cache_routing import AnyWorker, ratio, whole_sessions
from benchmarks.report import Cell
from cluster.routing_policy import RouteRequest
from cluster.view import ClusterView
from cluster.workload_traces import TraceRequest
from core.request import RequestId
from tests.unit.cluster.routing_views import view, worker

VIEW: ClusterView = view(*(worker(f"{role}{number}") for role in "pd" for number in range(4)))


def test_sessions_stay_whole() -> None:
    trace = [TraceRequest(10, 1, session_id=name, turn=turn) for name in "abc" for turn in range(3)]

    assert [request.session_id for request in whole_sessions(trace, 4)] == list("aaabbb")
    assert len(whole_sessions(trace, 100)) == 9


def test_any_worker_is_any_and_equal_requests_go_to_equal_ones() -> None:
    routes = [AnyWorker().route(RouteRequest(RequestId("r"), 100, ordinal), VIEW) for ordinal in range(400)]
    pairs = Counter((route.prefill.worker_id, route.decode.worker_id) for route in routes if route.prefill is not None)

    assert len(pairs) == 16, "every pair"
    assert max(pairs.values()) < 2 * 400 / 16
    assert AnyWorker().route(RouteRequest(RequestId("r"), 100, 7), VIEW) == routes[7]


def test_the_ratio_is_of_mean_ttfts_on_the_same_trace() -> None:
    rows: list[dict[str, Cell]] = [
        {"trace": trace, "routing": routing, "ttft_mean_s": seconds}
        for trace, routing, seconds in (("a", "load", 3.0), ("a", "global cache", 2.0), ("b", "load", 9.0))
    ]

    assert ratio(rows, "a", "load") == pytest.approx(1.5)
