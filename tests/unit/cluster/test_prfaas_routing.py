"""What PrfaaS routing promises on any view, and each of its decisions worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cost_model import NO_COSTS, ComputeCost, CostView, LinearCost
from cluster.prfaas_routing import PrfaasRouting
from cluster.routing_policy import COLOCATE, Fallback, RouteRequest, RoutingSettings
from cluster.view import ClusterView, Forecast, Offload, Route, WorkerView
from core.errors import NoRoute
from core.request import ClusterId, EngineId, Role
from tests.unit.cluster.routing_views import (
    AWAY,
    FAR,
    HOME,
    KV_BYTES,
    LINK,
    MODEL,
    NOW,
    clusters,
    link,
    request,
    requests,
    view,
    with_links,
    worker,
)

ALL_SETTINGS = st.builds(RoutingSettings, st.sampled_from(COLOCATE), st.booleans(), st.sampled_from([1.0, 1.5, 4.0]))
APART = RoutingSettings(colocate="never")


def route(request: RouteRequest, cluster: ClusterView, settings: RoutingSettings = APART) -> Route:
    return PrfaasRouting(settings).route(request, cluster)


def names(route: Route) -> tuple[str | None, str]:
    return None if route.prefill is None else route.prefill.worker_id, route.decode.worker_id


# ---- on any view ----


def routed(data: st.DataObject, settings: RoutingSettings) -> tuple[RouteRequest, ClusterView, Route] | None:
    """A made-up decision; None where there is none to make."""
    cluster = data.draw(clusters())
    asked = data.draw(requests(cluster))
    if not cluster.ready(Role.DECODE):
        with pytest.raises(NoRoute):
            route(asked, cluster, settings)
        return None
    return asked, cluster, route(asked, cluster, settings)


@given(st.data(), ALL_SETTINGS)
@settings(max_examples=100)
def test_only_ready_compatible_workers_with_a_usable_link_are_paired(
    data: st.DataObject, settings: RoutingSettings
) -> None:
    if (made := routed(data, settings)) is None:
        return
    asked, cluster, chosen = made
    assert chosen.reason
    assert chosen.decode in cluster.ready(Role.DECODE)
    if chosen.prefill is not None:
        assert chosen.prefill in cluster.ready(Role.PREFILL)
        assert chosen.prefill.model.fingerprint.compatible(chosen.decode.model.fingerprint)
        assert cluster.can_ship(chosen.prefill, chosen.decode)
    if chosen.pull is not None:
        source = chosen.pull.source
        assert chosen.prefill is not None
        assert source in (*cluster.ready(Role.PREFILL), *cluster.ready(Role.DECODE))
        assert source.engine_id not in asked.excluded
        assert source.model.fingerprint == chosen.prefill.model.fingerprint
        assert cluster.can_ship(source, chosen.prefill)
        assert chosen.pull.num_tokens % source.model.fingerprint.page_size == 0
        assert asked.cached_tokens(chosen.prefill) * settings.fetch_ratio < chosen.pull.num_tokens
        assert chosen.pull.num_tokens <= asked.cached_tokens(source)
        assert cluster.offload.abundant or source.cluster_id == chosen.prefill.cluster_id


@given(st.data(), ALL_SETTINGS)
def test_nobody_who_is_full_or_failed_is_taken_while_somebody_else_is_there(
    data: st.DataObject, settings: RoutingSettings
) -> None:
    if (made := routed(data, settings)) is None:
        return
    asked, cluster, chosen = made

    def room(worker: WorkerView) -> int:
        promised = worker.load.num_announced_tokens + worker.unreported_kv_tokens
        return worker.load.pages_free * worker.model.fingerprint.page_size - promised

    ready = cluster.ready(Role.DECODE)
    fresh = [w for w in ready if w.engine_id not in asked.excluded]
    assert chosen.decode in (fresh or ready)
    fitting = [w for w in fresh or ready if room(w) > asked.num_tokens]
    assert chosen.decode in (fitting or fresh or ready)


@given(st.data(), ALL_SETTINGS)
def test_equal_arguments_give_equal_routes_whatever_was_asked_before(
    data: st.DataObject, settings: RoutingSettings
) -> None:
    policy = PrfaasRouting(settings)
    first = data.draw(clusters())
    changed = [
        data.draw(st.sampled_from([w, replace(w, num_unreported=1, unreported_tokens=900), replace(w, draining=True)]))
        for w in first.workers
    ]
    later = replace(first, workers=tuple(changed), at=NOW + data.draw(st.sampled_from([0, 1, 6])))
    for cluster in (first, later, first):
        asked = data.draw(requests(cluster))
        if cluster.ready(Role.DECODE):
            assert policy.route(asked, cluster) == policy.route(asked, cluster) == route(asked, cluster, settings)
        else:
            with pytest.raises(NoRoute):
                policy.route(asked, cluster)


@given(st.data(), ALL_SETTINGS)
def test_a_forecast_is_finite_and_its_bytes_are_what_the_decode_worker_lacks(
    data: st.DataObject, settings: RoutingSettings
) -> None:
    if (made := routed(data, settings)) is None:
        return
    asked, _, chosen = made
    expected = chosen.expected
    assert expected is not None
    seconds = (expected.ttft_s, expected.tpot_s, expected.colocated_ttft_s, expected.colocated_tpot_s)
    assert all(value is not None and math.isfinite(value) and value >= 0 for value in seconds)
    lacking = asked.num_tokens - asked.cached_tokens(chosen.decode)
    assert expected.bytes_shipped == (0 if chosen.prefill is None else lacking * KV_BYTES)
    fetched = 0
    if chosen.pull is not None and chosen.prefill is not None:
        fetched = chosen.pull.num_tokens - asked.cached_tokens(chosen.prefill)
    assert expected.bytes_pulled == fetched * KV_BYTES


@given(st.data(), st.booleans())
@settings(max_examples=100)
def test_a_prompt_goes_to_a_prfaas_cluster_exactly_if_more_than_the_threshold_is_uncached(
    data: st.DataObject, pulls: bool
) -> None:
    if (made := routed(data, RoutingSettings(colocate="never", pulls=pulls))) is None:
        return
    asked, cluster, chosen = made
    if chosen.prefill is None:
        assert chosen.fallback
        return
    pd = {w.cluster_id for w in cluster.workers if w.role is Role.DECODE}
    ready = (*cluster.ready(Role.PREFILL), *cluster.ready(Role.DECODE))
    if cluster.offload.abundant and pulls:
        counting = list(ready)
    else:
        home = [w for w in ready if w.cluster_id == chosen.decode.cluster_id]
        counting = home if pulls else [w for w in home if w.role is Role.PREFILL]
    uncached = asked.num_tokens - max((asked.cached_tokens(w) for w in counting), default=0)
    goes = uncached > cluster.offload.threshold_tokens
    if chosen.fallback:
        assert goes
        assert chosen.prefill.cluster_id == chosen.decode.cluster_id
    else:
        assert goes == (chosen.prefill.cluster_id not in pd)
        assert goes or chosen.prefill.cluster_id == chosen.decode.cluster_id


@given(st.data())
def test_colocation_is_chosen_only_if_it_is_allowed(data: st.DataObject) -> None:
    cluster = data.draw(clusters())
    asked = data.draw(requests(cluster))
    if not cluster.ready(Role.DECODE):
        return
    always = route(asked, cluster, RoutingSettings(colocate="always"))
    never = route(asked, cluster, APART)
    auto = route(asked, cluster, RoutingSettings(colocate="auto"))
    assert always.prefill is None
    assert not always.fallback
    assert never.prefill is not None or never.fallback
    assert auto.prefill is None or auto == never


def test_a_cost_view_that_knows_nothing_is_no_obstacle() -> None:
    cluster = replace(view(worker("p0"), worker("d0")), costs=NO_COSTS)
    expected = route(request(), cluster).expected
    assert expected is not None
    assert 0 < expected.ttft_s < 1


# ---- the terms, by hand: a prompt token takes 1 ms, a decode step 10 ms and 1 ms a sequence ----


def test_a_forecast_is_queue_and_prefill_then_steps_and_what_prefill_could_not_hide() -> None:
    cluster = view(worker("p0", num_waiting=1, num_waiting_tokens=300), worker("d0", num_running=4))
    expected = route(request(1000, {"p0": 160, "d0": 224}, num_output=101), cluster).expected

    transfer_s = 776 * KV_BYTES * 1e-8
    last_layer_s = transfer_s * 512 / 1000 / 10
    assert expected == Forecast(
        ttft_s=pytest.approx(0.3 + 0.84),
        tpot_s=pytest.approx(0.015 + last_layer_s / 100),
        bytes_shipped=776 * KV_BYTES,
        colocated_ttft_s=pytest.approx(0.776 + 2 * 0.004),
        colocated_tpot_s=pytest.approx(0.015),
    )


def test_a_slow_link_is_paid_for_as_far_as_prefill_cannot_hide_it() -> None:
    p0, d0 = worker("p0"), worker("d0")
    cluster = with_links(view(p0, d0), link(p0, d0, rate=5e5))
    expected = route(request(1000, num_output=11), cluster).expected
    assert expected is not None
    assert expected.ttft_s == pytest.approx(1.0), "the first token comes from the prefill worker"
    assert expected.tpot_s == pytest.approx(0.011 + (2.0 - 1.0) / 10)


def test_the_shortest_predicted_queue_is_taken_with_what_was_sent_and_not_reported_yet() -> None:
    idle, busy = worker("p0"), worker("p1", num_waiting=2, num_waiting_tokens=500)
    assert names(route(request(), view(idle, busy, worker("d0")))) == ("p0", "d0")
    sent = replace(idle, num_unreported=1, unreported_tokens=600)
    assert names(route(request(), view(sent, busy, worker("d0")))) == ("p1", "d0")


def test_equal_costs_go_to_the_smaller_ids() -> None:
    assert names(route(request(), view(*(worker(name) for name in ("p1", "p0", "d1", "d0"))))) == ("p0", "d0")


def test_a_faster_kind_of_worker_may_wait_longer() -> None:
    slow = replace(view().costs.profiles["gpu"], step_tokens=512)
    slow = replace(slow, prefill_cost=replace(slow.prefill_cost, coefficients=(0.0, 4e-3, 0.0)))
    cluster = view(worker("p0", profile="slow"), worker("p1", num_waiting=1, num_waiting_tokens=2000), worker("d0"))
    cluster = replace(cluster, costs=replace(cluster.costs, profiles={**cluster.costs.profiles, "slow": slow}))
    assert names(route(request(1000), cluster)) == ("p1", "d0"), "3 s there, 4 s on the idle slow one"


def test_the_decode_worker_with_the_shortest_predicted_step_is_taken() -> None:
    cluster = view(worker("p0"), worker("d0", num_running=5), worker("d1", num_running=3, num_announced=1))
    assert names(route(request(), cluster)) == ("p0", "d1")


def test_a_worker_that_still_decodes_gets_prompts_when_others_would_keep_them_waiting_longer() -> None:
    """3 sequences of its time as a decode worker wait for each prompt's second: as 3 s of queue elsewhere."""
    draining, busy, busier = (
        worker("p0", num_other_role=3),
        worker("p1", num_waiting=2, num_waiting_tokens=2_000),
        worker("p2", num_waiting=4, num_waiting_tokens=4_000),
    )

    assert names(route(request(1000), view(worker("d0"), draining, busy))) == ("p1", "d0")
    assert names(route(request(1000), view(worker("d0"), draining, busier))) == ("p0", "d0")


def test_a_full_batch_is_left_for_one_that_is_not_even_if_steps_take_as_long_whatever_they_hold() -> None:
    """A token every 10 ms in a batch of up to 4; of 6 sequences two wait, as if all had one every 15 ms."""
    level = ComputeCost(LinearCost((0.0, 1e-3, 0.0)), LinearCost((1e-2, 0.0, 0.0)), 512)
    costs = CostView({"gpu": level}, {(HOME, HOME): LINK})
    full, free = worker("d0", num_running=5, max_batch_size=4), worker("d1", num_running=3, max_batch_size=4)
    chosen = route(request(), view(worker("p0"), full, free, costs=costs))
    crowded = route(request(), view(worker("p0"), full, costs=costs))

    assert names(chosen) == ("p0", "d1")
    assert chosen.expected is not None
    assert crowded.expected is not None
    assert chosen.expected.tpot_s == pytest.approx(0.010, rel=0.01)
    assert crowded.expected.tpot_s == pytest.approx(0.015, rel=0.01)


def test_context_that_grows_counts_in_a_step() -> None:
    costs = view().costs
    gpu = costs.profiles["gpu"]
    gpu = replace(gpu, decode_cost=replace(gpu.decode_cost, coefficients=(0.0, 0.0, 1e-6)))
    long, short = worker("d0", pages_free=9_000, num_running=1), worker("d1", pages_free=9_990, num_running=30)
    cluster = view(worker("p0"), long, short, costs=replace(costs, profiles={"gpu": gpu}))

    assert names(route(request(100, num_output=10), cluster)) == ("p0", "d1"), "16,000 tokens against 160"
    expected = route(request(100, num_output=10), cluster).expected
    assert expected is not None
    assert expected.tpot_s == pytest.approx(1e-6 * (160 + 100 + 31 * 10 / 2), rel=0.05)
    assert names(route(request(100, num_output=2000), cluster)) == ("p0", "d0"), "30 of them grow by 1,000 each"


def test_room_is_wanted_for_the_prompt_and_what_is_expected_to_follow() -> None:
    tight, roomy = worker("d0", pages=70), worker("d1", pages=100, num_running=20)
    cluster = view(worker("p0"), tight, roomy)
    assert names(route(request(1000, num_output=100), cluster)) == ("p0", "d0")
    assert names(route(request(1000, num_output=200, mean_output=10.0), cluster)) == ("p0", "d1")
    assert names(route(request(1000, num_output=200, mean_output=100.0), cluster)) == ("p0", "d0"), "neither has it"
    promised = replace(tight, unreported_kv_tokens=200)
    assert names(route(request(1000, num_output=100), view(worker("p0"), promised, roomy))) == ("p0", "d1")


def test_of_equal_decode_workers_the_one_that_lacks_least_is_shipped_to() -> None:
    cluster = view(worker("p0"), worker("d0"), worker("d1"))
    assert names(route(request(1000, {"d1": 800}), cluster)) == ("p0", "d1")


def test_a_slow_link_makes_a_cached_prefix_worth_a_fuller_batch() -> None:
    p0, d0, d1 = worker("p0"), worker("d0"), worker("d1", num_running=5)
    asked = request(1000, {"d1": 800}, num_output=11)
    assert names(route(asked, view(p0, d0, d1))) == ("p0", "d0"), "50 ms more to decode, 8 ms of a link saved"
    slow = with_links(view(p0, d0, d1), link(p0, d0, 1e5), link(p0, d1, 1e5))
    slow = replace(
        slow,
        costs=replace(
            slow.costs, transfers={(HOME, HOME): replace(slow.costs.transfers[HOME, HOME], coefficients=(0.0, 1e-5))}
        ),
    )
    assert names(route(asked, slow)) == ("p0", "d1"), "9 s of transfer saved"


# ---- offloading ----


def offloading(threshold: float, *, abundant: bool = False) -> ClusterView:
    """One PD cluster, and two that only prefill."""
    workers = (worker("p0"), worker("d0"), worker("p1", AWAY), worker("p2", FAR))
    return view(*workers, offload=Offload(threshold, abundant))


def test_what_is_longer_than_the_threshold_leaves_and_the_rest_stays() -> None:
    assert names(route(request(1000), offloading(1000))) == ("p0", "d0")
    far = route(request(1001), offloading(1000))
    assert names(far) == ("p1", "d0")
    assert far.place == "offloaded"
    assert "1001 of 1001 tokens uncached, more than 1000 (scarce)" in far.reason
    assert names(route(request(100_00), offloading(math.inf))) == ("p0", "d0")


def test_while_bandwidth_is_scarce_only_the_clusters_own_caches_count() -> None:
    asked = request(1000, {"p0": 480, "p1": 960})
    assert names(route(asked, offloading(600))) == ("p0", "d0"), "520 to compute at home"
    away = route(asked, offloading(500))
    assert names(away) == ("p1", "d0")
    assert away.expected is not None
    assert away.expected.ttft_s == pytest.approx(0.04), "it has a cache of its own"
    assert names(route(request(1000, {"p1": 960}), offloading(600))) == ("p1", "d0")


def test_while_bandwidth_is_abundant_the_best_cache_anywhere_counts_and_is_fetched() -> None:
    fetching = route(request(1000, {"p1": 960}), offloading(600, abundant=True))
    assert names(fetching) == ("p0", "d0"), "40 tokens are to be computed"
    assert fetching.pull is not None
    assert (fetching.pull.source.worker_id, fetching.pull.num_tokens) == ("p1", 960)
    away = route(request(1000, {"p0": 320}), offloading(600, abundant=True))
    assert names(away) == ("p1", "d0")
    assert away.pull is not None
    assert away.pull.source.worker_id == "p0"
    assert away.expected is not None
    assert away.expected.ttft_s == pytest.approx(320 * KV_BYTES * 1e-8 + 0.68)


def test_without_pulls_abundance_changes_nothing() -> None:
    settings = RoutingSettings(colocate="never", pulls=False)
    asked = request(1000, {"p1": 960})
    assert names(route(asked, offloading(600, abundant=True), settings)) == ("p1", "d0")
    assert route(asked, offloading(600, abundant=True), settings).pull is None


def test_of_several_prfaas_clusters_the_first_token_decides() -> None:
    busy = replace(offloading(0), workers=())
    p1, p2, d0 = worker("p1", AWAY, num_waiting=1, num_waiting_tokens=700), worker("p2", FAR), worker("d0")
    assert names(route(request(1000), replace(busy, workers=(d0, p1, p2)))) == ("p2", "d0")
    slow = with_links(replace(busy, workers=(d0, p1, p2)), link(p2, d0, rate=1e5))
    assert names(route(request(1000), slow)) == ("p1", "d0"), "9 s of transfer are exposed"


def test_a_prompt_that_should_leave_and_cannot_stays_and_says_so() -> None:
    p0, d0, p1 = worker("p0"), worker("d0"), worker("p1", AWAY)
    none = route(request(1000), view(p0, d0, offload=Offload(500)))
    assert (names(none), none.fallback) == (("p0", "d0"), Fallback.NO_PRFAAS_WORKER)
    assert "no PrfaaS worker is ready" in none.reason
    cut = route(
        request(1000), with_links(view(p0, d0, p1, offload=Offload(500)), link(p1, d0, reason="PeerLost: gone"))
    )
    assert (names(cut), cut.fallback) == (("p0", "d0"), Fallback.LINK_DOWN)
    assert "p1 to it: PeerLost: gone" in cut.reason
    other = replace(MODEL, fingerprint=replace(MODEL.fingerprint, layout="another"))
    odd = route(request(1000), view(p0, d0, replace(p1, model=other), offload=Offload(500)))
    assert (names(odd), odd.fallback) == (("p0", "d0"), Fallback.INCOMPATIBLE)
    assert not route(request(400), view(p0, d0, offload=Offload(500))).fallback


def test_each_pd_cluster_decides_by_its_own_caches_and_the_cheapest_is_taken() -> None:
    east, west = ClusterId("home"), ClusterId("west")
    cluster = view(
        worker("p0", east), worker("d0", east), worker("p1", west), worker("d1", west), worker("p2", FAR),
        offload=Offload(500),
    )  # fmt: skip
    staying = route(request(1000, {"p1": 640}), cluster)
    assert names(staying) == ("p1", "d1"), "360 tokens stay in the west, 1,000 would leave the east"
    assert staying.place == "local"


# ---- pulls ----


def test_cached_pages_are_fetched_if_the_holder_is_busy() -> None:
    holder = worker("p0", num_waiting=3, num_waiting_tokens=3000)
    cluster = view(holder, worker("p1"), worker("d0"))
    chosen = route(request(1000, {"p0": 960}), cluster)
    assert names(chosen) == ("p1", "d0")
    assert chosen.pull is not None
    assert (chosen.pull.source, chosen.pull.num_tokens) == (holder, 960)
    assert chosen.expected is not None
    assert chosen.expected.ttft_s == pytest.approx(960 * KV_BYTES * 1e-8 + 0.04)
    assert chosen.expected.bytes_pulled == 960 * KV_BYTES
    assert "pull of 960 tokens from p0" in chosen.reason
    assert route(request(1000, {"p0": 960}), cluster, RoutingSettings("never", pulls=False)).pull is None


def test_what_decoding_wrote_is_fetched_for_the_next_turn() -> None:
    chosen = route(request(1000, {"p0": 320, "d0": 960}), view(worker("p0"), worker("d0")))
    assert chosen.pull is not None
    assert (chosen.pull.source.worker_id, chosen.pull.num_tokens) == ("d0", 960)


def test_nothing_is_fetched_that_is_not_much_more_or_not_faster() -> None:
    holder, other, decode = worker("p0", num_waiting=3, num_waiting_tokens=3000), worker("p1"), worker("d0")
    cluster = view(holder, other, decode)
    assert route(request(1000, {"p0": 960, "p1": 656}), cluster).pull is None, "960 are not 1.5 times 656"
    assert route(request(1000, {"p0": 960, "p1": 624}), cluster).pull is not None
    slow = with_links(cluster, link(holder, other, rate=1e6))
    assert route(request(1000, {"p0": 960}), slow).pull is None, "0.96 s to fetch, 0.96 s to compute"
    down = with_links(cluster, link(holder, other, reason="PeerLost: gone"))
    assert route(request(1000, {"p0": 960}), down).pull is None
    failed = request(1000, {"p0": 960}, excluded=frozenset({EngineId("p0-e1")}))
    assert route(failed, cluster).pull is None


def test_of_holders_that_hold_as_much_the_least_busy_one_is_asked() -> None:
    holders = [worker(f"p{i}", num_waiting=9, num_waiting_tokens=9000 - i) for i in range(20)]
    cluster = view(*holders, worker("p99"), worker("d0"))
    chosen = route(request(1000, {w.worker_id: 960 for w in holders}), cluster)
    assert chosen.pull is not None
    assert chosen.pull.source.worker_id == "p19"


def test_a_hot_prefix_gets_more_holders() -> None:
    """Prompts with one prefix, faster than one worker can take them: others fetch it and hold it from then on."""
    policy, cached = PrfaasRouting(APART), {"p0": 960}
    waiting = dict.fromkeys(("p0", "p1", "p2", "p3"), 0)
    for _ in range(40):
        workers = [worker(name, num_waiting=bool(n), num_waiting_tokens=n) for name, n in waiting.items()]
        chosen = policy.route(request(1000, cached), view(*workers, worker("d0")))
        assert chosen.prefill is not None
        name = chosen.prefill.worker_id
        waiting[name] += 1000 - max(cached.get(name, 0), chosen.pull.num_tokens if chosen.pull else 0)
        cached[name] = 960
    assert cached == dict.fromkeys(waiting, 960)
    assert max(waiting.values()) <= 11 * 40, "each takes its quarter, and computes 40 tokens of each"


# ---- what a prompt pushes out of a cache ----


def with_cache(name: str, empty_pages: int, hit_rate: float, **load: int) -> WorkerView:
    """A prefill worker of 1,000 pages, so many of them empty, whose prompts found that share of tokens in its cache."""
    pages = {"pages_free": 1000, "pages_cached": 1000 - empty_pages}
    return worker(name, **pages, prompt_tokens=10_000, cached_tokens=round(10_000 * hit_rate), **load)


def test_a_prompt_waits_for_its_own_cache_rather_than_push_out_what_others_come_back_for() -> None:
    """960 tokens would have to be kept at p1, and computing them again takes 0.96 s."""
    decode, asked = worker("d0"), request(1000, {"p0": 960})
    busy = with_cache("p0", 0, 0.5, num_waiting=1, num_waiting_tokens=300)

    full = route(asked, view(busy, with_cache("p1", 0, 0.5), decode))
    assert names(full) == ("p0", "d0"), "0.30 s of queue + 0.02 for 40 tokens beat 0.01 of pull + 0.5 * 1.00"
    assert full.expected is not None
    assert full.expected.ttft_s == pytest.approx(0.3 + 0.04), "what others lose delays them, not this request"
    assert "0.020 s displaced" in full.reason

    roomy = route(asked, view(busy, with_cache("p1", 63, 0.5), decode))
    assert names(roomy) == ("p1", "d0"), "63 empty pages take 1,000 tokens"
    assert "displaced" not in roomy.reason
    unwanted = route(asked, view(busy, with_cache("p1", 0, 0.05), decode))
    assert names(unwanted) == ("p1", "d0"), "0.05 of what is there is asked for again"


def test_of_idle_workers_a_new_prompt_goes_where_least_is_lost() -> None:
    full, roomy = with_cache("p0", 10, 0.5), with_cache("p1", 50, 0.5)
    assert names(route(request(1000), view(full, roomy, worker("d0")))) == ("p1", "d0")


# ---- colocation ----


def test_short_prompts_stay_on_the_decode_worker_when_shipping_is_not_worth_it() -> None:
    p0, d0 = worker("p0", num_waiting=1, num_waiting_tokens=500), worker("d0")
    auto = RoutingSettings("auto")
    here = route(request(100), view(p0, d0), auto)
    assert (names(here), here.fallback, here.place) == ((None, "d0"), "", "colocated")
    assert "shipping is not worth it" in here.reason
    assert here.expected == Forecast(
        pytest.approx(0.1), pytest.approx(0.011), 0, 0, pytest.approx(0.1), pytest.approx(0.011)
    )
    assert names(route(request(1000), view(p0, d0), auto)) == ("p0", "d0"), "1 s of everybody's decoding against 0.5 s"
    busy = replace(d0, load=replace(d0.load, num_running=8))
    assert names(route(request(100), view(p0, busy), auto)) == ("p0", "d0"), "eight sequences would wait 0.1 s each"


def test_the_next_turn_of_a_conversation_stays_where_it_was_written() -> None:
    auto = RoutingSettings("auto", pulls=False)
    assert names(route(request(1000, {"p0": 480, "d0": 960}), view(worker("p0"), worker("d0")), auto)) == (None, "d0")


def test_prefill_beside_a_batch_takes_longer() -> None:
    """Two steps of 500 tokens, each with what 9 sequences add."""
    expected = route(request(1000), view(worker("p0"), worker("d0", num_running=9))).expected
    assert expected is not None
    assert expected.colocated_ttft_s == pytest.approx(1.0 + 2 * 0.009)


# ---- without a prefill worker ----


def test_without_a_prefill_worker_the_decode_worker_prefills_and_the_route_says_so() -> None:
    for colocate in ("never", "auto"):
        chosen = route(request(), view(worker("d0")), RoutingSettings(colocate))
        assert (names(chosen), chosen.fallback) == ((None, "d0"), Fallback.NO_PREFILL_WORKER)
    p0, d0 = worker("p0"), worker("d0")
    cut = route(request(), with_links(view(p0, d0), link(p0, d0, reason="not tested yet")))
    assert (names(cut), cut.fallback) == ((None, "d0"), Fallback.LINK_DOWN)


def test_who_failed_the_sequence_is_the_last_resort() -> None:
    cluster = view(worker("p0"), worker("p1", num_waiting=9, num_waiting_tokens=90_000), worker("d0"), worker("d1"))
    fresh = route(request(excluded=frozenset({EngineId("p0-e1"), EngineId("d0-e1")})), cluster)
    assert names(fresh) == ("p1", "d1")
    left = route(request(excluded=frozenset({EngineId("p0-e1"), EngineId("p1-e1")})), cluster)
    assert names(left) == ("p0", "d0")
    assert "p0 failed this sequence before" in left.reason


def test_links_far_down_the_list_are_found_if_no_other_may_be_used() -> None:
    prefills, decodes = [worker(f"p{i}") for i in range(6)], [worker(f"d{i}", num_running=i) for i in range(6)]
    broken = [
        link(p, d, reason="down") for p in prefills for d in decodes if (p.worker_id, d.worker_id) != ("p5", "d5")
    ]
    assert names(route(request(), with_links(view(*prefills, *decodes), *broken))) == ("p5", "d5")
