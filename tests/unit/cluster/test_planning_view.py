"""A cluster in the planner's numbers: whose workers count as what, their seconds, links and queues, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cluster.cost_model import ASSUMED_LINK_BYTES_PER_S, ComputeCost, CostView, LinearCost
from cluster.length_distribution import LengthDistribution
from cluster.planning_policy import MeasuredDemand, PlanningView
from cluster.planning_view import Fleets, fleets, planning_view, silent_links
from cluster.view import ClusterView, Links, LinkView, WorkerLoad, WorkerView
from core.link import LinkEstimate
from core.request import ClusterId, EngineId, Role, WorkerId
from tests.unit.cluster.scripted_router import MODEL, worker

HOME, EAST, WEST = ClusterId("local"), ClusterId("east"), ClusterId("west")
DEMAND = MeasuredDemand(LengthDistribution.from_sample([1000]), 2.0, mean_output_tokens=200, mean_cached_tokens=500)
COSTS = CostView(
    {
        "slow": ComputeCost(LinearCost((0.1, 1e-3, 1e-6)), LinearCost((0.01, 1e-3, 1e-6))),
        "fast": ComputeCost(LinearCost((0.1, 1e-4, 0.0)), LinearCost((0.01, 0.5e-3, 0.5e-6))),
    },
    {},
)


def member(name: str, role: Role, cluster: ClusterId = HOME, profile: str = "slow", **load: int) -> WorkerView:
    found = worker(name, role, load=WorkerLoad(**{"pages_free": 90, **load}))
    return replace(found, cluster_id=cluster, profile=profile, pages_total=10_000, max_batch_size=64)


def link(sender: WorkerView, receiver: WorkerView, *, usable: bool = True, **numbers: float) -> Links:
    estimate = LinkEstimate(receiver.worker_id, receiver.cluster_id, **numbers) if numbers else None  # type: ignore[arg-type]
    pair = sender.worker_id, receiver.worker_id
    return {
        pair: LinkView(pair[0], sender.cluster_id, pair[1], receiver.cluster_id, 0.0, estimate=estimate, usable=usable)
    }


def found_in(view: ClusterView, capacity: float | None = None) -> Fleets:
    return fleets(view, HOME, lambda *_: capacity)


def seen(
    *workers: WorkerView,
    links: Links | None = None,
    demand: MeasuredDemand = DEMAND,
    tpot_s: float | None = None,
    costs: CostView = COSTS,
    becoming: dict[EngineId, Role] | None = None,
    capacity: float | None = None,
) -> PlanningView:
    found = found_in(ClusterView(0.0, workers, links or {}), capacity)
    return planning_view(found, costs, demand, becoming=becoming or {}, tpot_s=tpot_s, num_queued=0, now=7.0)


P, D = member("p", Role.PREFILL), member("d", Role.DECODE)
AWAY = member("east/p", Role.PREFILL, EAST, "fast")


def test_clusters_with_a_decode_worker_serve_and_the_others_are_prfaas() -> None:
    far = (member("w", Role.DECODE, WEST), member("x", Role.PREFILL, WEST))
    gone = replace(member("y", Role.DECODE), draining=True)
    found = found_in(ClusterView(0.0, (P, D, AWAY, *far, gone)))

    assert {w.worker_id for w in found.local} == {"p", "d", "w", "x"}
    assert {w.worker_id for w in found.prfaas} == {"east/p"}


def test_the_gateways_own_cluster_is_no_prfaas_cluster_while_it_has_no_decode_worker() -> None:
    assert found_in(ClusterView(0.0, (P,))).prfaas == ()
    assert seen(P).num_prefill == 1


def test_a_worker_that_changes_counts_as_what_it_is_becoming() -> None:
    view = seen(P, D, AWAY, becoming={P.engine_id: Role.DECODE})

    assert (view.num_prefill, view.num_decode, view.num_changing, view.num_prfaas) == (0, 2, 1, 1)
    assert view.at_s == 7.0
    assert view.num_draining == 0
    assert seen(P, D, AWAY, becoming={D.engine_id: Role.PREFILL}).num_draining == 1


def test_prefill_seconds_are_those_behind_the_mean_cached_prefix() -> None:
    view = seen(P, D)
    expected = 0.1 + 1e-3 * 1000 + 1e-6 * 1000 * (500 + 500)

    assert float(view.local_prefill_s(np.asarray(1000.0))) == pytest.approx(expected)
    assert float(view.local_prefill_s(np.asarray(1000.0))) == pytest.approx(COSTS.profiles["slow"].prefill(1000, 500))


def test_a_prompt_of_many_steps_pays_for_each_of_them() -> None:
    stepped = replace(COSTS.profiles["slow"], step_tokens=256)
    view = seen(P, D, costs=CostView({"slow": stepped}, {}))

    tokens = np.asarray([1.0, 256.0, 257.0, 1000.0])
    assert view.local_prefill_s(tokens) == pytest.approx([stepped.prefill(float(n), 500) for n in tokens])


def test_workers_that_differ_are_added_up_by_their_rates() -> None:
    view = seen(P, replace(D, profile="fast"))
    slow, fast = COSTS.profiles["slow"].prefill(1000, 500), COSTS.profiles["fast"].prefill(1000, 500)

    assert float(view.local_prefill_s(np.asarray(1000.0))) == pytest.approx(2 / (1 / slow + 1 / fast))


def test_a_decode_batch_is_what_limits_pages_and_objective_allow() -> None:
    context = 1000 + 500 + 100
    step = COSTS.profiles["slow"].decode_step
    free = seen(P, D)
    assert free.max_batch_size == 64
    assert free.decode_step_s == pytest.approx(step(64, 64 * context))
    assert free.decode_step_of is not None
    assert float(free.decode_step_of(np.asarray(8.0))) == pytest.approx(step(8, 8 * context))

    small = seen(*(replace(w, max_batch_size=8) for w in (P, D)))
    assert small.max_batch_size == 8
    few_pages = seen(*(replace(w, pages_total=1700) for w in (P, D)))  # 27,200 tokens: 16 sequences of 1,700
    assert few_pages.max_batch_size == 16
    held = seen(P, D, tpot_s=0.05)
    assert held.tpot_s == 0.05
    assert held.decode_step_s == pytest.approx(0.05)
    assert held.max_batch_size == pytest.approx(0.04 / (1e-3 + 1e-6 * context))
    assert seen(P, D, tpot_s=0.001).max_batch_size == 1  # met by none: one at a time


def test_the_decode_rate_of_workers_that_differ_is_the_sum_of_theirs() -> None:
    view = seen(P, replace(D, profile="fast"))
    context = 1600
    rate = sum(64 / COSTS.profiles[name].decode_step(64, 64 * context) for name in ("slow", "fast"))

    assert 2 * view.max_batch_size / view.decode_step_s == pytest.approx(rate)


def test_links_count_from_prfaas_to_serving_clusters_if_one_of_them_works() -> None:
    numbers = {"goodput": 40.0, "throughput": 30.0, "bytes_queued": 80}
    used = seen(P, D, AWAY, links=link(AWAY, D, **numbers) | link(P, D, goodput=7.0, bytes_queued=9))
    assert (used.link_bytes_per_s, used.link_utilisation, used.link_queue_s) == (40.0, 0.75, 2.0)

    assert seen(P, D, AWAY, links=link(AWAY, D, usable=False, **numbers)).link_bytes_per_s == 0
    assert seen(P, D, AWAY, links=link(AWAY, D)).link_bytes_per_s == ASSUMED_LINK_BYTES_PER_S
    assert seen(P, D, AWAY, links=link(AWAY, D), capacity=5e9).link_bytes_per_s == 5e9
    assert seen(P, D).link_bytes_per_s == 0


def test_a_link_is_full_by_what_it_carries_now() -> None:
    narrowed = link(AWAY, D, goodput=10.0, throughput=10.0)

    assert seen(P, D, AWAY, links=narrowed, capacity=100.0).link_utilisation == 1.0


def test_queues_are_seconds_of_prefill_and_sequences_without_a_place() -> None:
    each_s = COSTS.profiles["slow"].prefill(1000, 500)
    waiting = member("q", Role.PREFILL, num_waiting_tokens=4000)
    view = seen(P, waiting, D, member("e", Role.DECODE, num_waiting=3))
    assert view.local_queue_s == pytest.approx(2 * each_s)  # 4 prompts before one of two
    assert view.decode_queue == 3

    full = member("f", Role.DECODE, pages_free=10, num_waiting=1, num_sessions=2)  # 160 tokens: not one sequence
    assert seen(P, full).decode_queue == 3
    away = replace(AWAY, load=WorkerLoad(num_waiting_tokens=3000))
    assert seen(P, D, away).prfaas_queue_s == pytest.approx(3 * COSTS.profiles["fast"].prefill(1000, 500))


def test_without_costs_of_local_workers_it_says_so_and_others_are_taken_as_they_are() -> None:
    assert seen(P, D, costs=CostView({}, {})).unknown == "no costs are known yet"
    unknown_away = seen(P, D, replace(AWAY, profile="new"))
    assert unknown_away.unknown == ""
    tokens = np.asarray(1000.0)
    assert float(unknown_away.prfaas_prefill_s(tokens)) == float(unknown_away.local_prefill_s(tokens))
    assert seen(P, replace(D, profile="new")).unknown == ""


def test_an_empty_cluster_and_no_demand_are_no_error() -> None:
    nothing = seen(demand=MeasuredDemand(None, 0.0, 0.0))

    assert (nothing.num_prefill, nothing.num_decode, nothing.local_queue_s) == (0, 0, 0.0)
    assert nothing.unknown
    assert MODEL.kv_bytes_per_token == seen(P, D).kv_bytes(np.asarray(1.0))


def test_a_path_is_silent_when_none_of_its_links_moved_anything() -> None:
    other = member("e", Role.DECODE)
    both = link(AWAY, D, age_s=9.0) | link(AWAY, other, age_s=6.0) | link(P, D, age_s=99.0)
    view = ClusterView(0.0, (P, D, AWAY, other), both)

    assert [found.to_worker for found in silent_links(view, found_in(view), 5.0)] == ["d"]
    assert silent_links(view, found_in(view), 7.0) == ()
    broken = ClusterView(0.0, (P, D, AWAY), link(AWAY, D, usable=False, age_s=9.0))
    assert silent_links(broken, found_in(broken), 5.0) == ()
    never = ClusterView(0.0, (P, D, AWAY), link(AWAY, D))
    assert silent_links(never, found_in(never), math.inf) == tuple(never.links.values())
    assert WorkerId("p") not in {found.from_worker for found in silent_links(view, found_in(view), 5.0)}


def test_of_a_silent_path_a_link_is_chosen_that_self_tests_know() -> None:
    turned = member("c", Role.PREFILL)  # it has decoded before: the first link of the path, which nobody tests any more
    both = link(AWAY, turned, age_s=9.0) | link(AWAY, D, age_s=9.0)
    view = ClusterView(0.0, (P, D, AWAY, turned), both)

    assert [found.to_worker for found in silent_links(view, found_in(view), 5.0)] == ["d"]
    alone = ClusterView(0.0, (P, D, AWAY, turned), link(AWAY, turned, age_s=9.0))
    assert silent_links(alone, found_in(alone), 5.0) == ()
