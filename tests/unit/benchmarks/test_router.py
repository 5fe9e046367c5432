"""The router's benchmark runs, and what it compares agrees: same depths from every index, same choice from arrays."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from benchmarks import router
from benchmarks.fleet_history import PAGE_TOKENS, FleetHistory
from benchmarks.router_fleet import Fleet, engine_id
from benchmarks.router_peers import PLAIN_INDEXES, choose
from cluster.prefix_index import PrefixIndex
from cluster.routing_policy import POLICIES, CacheAware, RouteRequest
from core.request import RequestId, Role

NUM_WORKERS, NUM_PAGES = 20, 12_000


@pytest.fixture(scope="module")
def served() -> tuple[FleetHistory, PrefixIndex]:
    """A history and what our index has heard of it, some of it evicted again."""
    history, index = FleetHistory(NUM_WORKERS, NUM_PAGES), PrefixIndex()
    for worker in range(NUM_WORKERS):
        index.add_worker(engine_id(worker))
    for told in [*history.fill(), *islice(history.churn(50), 40)]:
        index.apply(engine_id(told.worker), told.events)
    return history, index


def test_a_history_is_the_same_for_equal_seeds_and_holds_the_pages_asked_for() -> None:
    first, second = FleetHistory(NUM_WORKERS, NUM_PAGES), FleetHistory(NUM_WORKERS, NUM_PAGES)

    assert list(first.fill()) == list(second.fill())
    assert NUM_PAGES <= first.num_pages < NUM_PAGES + 2500
    assert [p.kind for p in first.prompts(9, 64)] == [p.kind for p in second.prompts(9, 64)]


@pytest.mark.parametrize("name", PLAIN_INDEXES)
def test_the_plain_indexes_find_what_ours_does(name: str, served: tuple[FleetHistory, PrefixIndex]) -> None:
    told_again, plain = FleetHistory(NUM_WORKERS, NUM_PAGES), PLAIN_INDEXES[name]()
    for told in [*told_again.fill(), *islice(told_again.churn(50), 40)]:
        plain.apply(engine_id(told.worker), told.events)
    found = 0
    for prompt in told_again.prompts(30, 2048):
        match = served[1].match(prompt.hashes())
        expected = {engine: pages for engine in match.slots if (pages := match.pages_on(engine))}
        found += len(expected)

        assert plain.depths(prompt.hashes()) == expected

    assert found > 30


def test_arrays_choose_whom_a_look_at_each_worker_would(served: tuple[FleetHistory, PrefixIndex]) -> None:
    history, index = served
    fleet = Fleet(NUM_WORKERS)
    for ordinal, prompt in enumerate(history.prompts(100, 2048)):
        view, hashes = fleet.view(), prompt.hashes()
        match = index.match(hashes)
        tokens = len(hashes) * PAGE_TOKENS - ordinal % 5 * 5000
        depths = {engine: match.pages_on(engine) for engine in match.slots}

        route = CacheAware().route(RouteRequest(RequestId("r"), tokens, 0, matches={PAGE_TOKENS: match}), view)

        plain = choose(view.ready(Role.PREFILL), view.ready(Role.DECODE), depths, tokens, PAGE_TOKENS)
        assert (route.prefill, route.decode) == plain
        fleet.assign(plain[0].engine_id, plain[1].engine_id)


def test_a_quick_run_has_a_row_for_every_policy_and_the_figures_of_the_issue(tmp_path: Path) -> None:
    path = tmp_path / "router.json"

    assert router.main(["--quick", "--pages", "5000", "--workers", "8", "--json", str(path)]) == 0

    found = json.loads(path.read_text(encoding="utf-8"))
    names = {"decision_us_p50_8w", "decision_us_p99_8w", "view_us_8w", "events_per_s", "index_bytes_per_page"}
    assert names <= found["figures"].keys()
    assert all(value > 0 for value in found["figures"].values())
    policies = {row["policy"] for row in found["rows"] if row["index"] == router.OURS and "policy" in row}
    assert policies == set(POLICIES)
