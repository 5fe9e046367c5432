"""What every policy promises, on views that hypothesis makes up, and what each of them adds, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.prefix_index import PrefixLevel, PrefixMatch
from cluster.routing_policy import (
    POLICIES,
    CacheAware,
    Fallback,
    LeastLoaded,
    RoundRobin,
    RouteRequest,
    RoutingPolicy,
    RoutingSettings,
    make_policy,
)
from cluster.view import ClusterView, LinkView, ModelInfo, WorkerLoad, WorkerView
from core.errors import InvalidConfig, NoRoute
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, EngineId, RequestId, Role, WorkerId

MODEL = ModelInfo(
    architecture="Fake",
    fingerprint=CacheFingerprint(model="m", revision="r", dtype="float32", page_size=16, layout="l"),
    max_model_len=1024,
    vocab_size=100,
    eos_token_ids=(0,),
    kv_bytes_per_token=64,
)
NOW = 100.0
APART = RoutingSettings(colocate="never")  # prefill workers prefill, whatever it costs


def worker(worker_id: str, role: Role, **changes: object) -> WorkerView:
    view = WorkerView(
        worker_id=WorkerId(worker_id),
        engine_id=EngineId(f"{worker_id}-e1"),
        cluster_id=ClusterId("test"),
        address=f"{worker_id}:1",
        role=role,
        draining=False,
        lease_expires_at=NOW + 5,
        model=MODEL,
        transport="tcp",
        pages_total=100,
        load=WorkerLoad(pages_free=100),
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView(at=NOW, workers=tuple(sorted(workers, key=lambda w: w.worker_id)))


def request(ordinal: int = 0, num_tokens: int = 32, excluded: frozenset[EngineId] = frozenset()) -> RouteRequest:
    return RouteRequest(RequestId("r"), num_tokens, ordinal, excluded)


def other_layout(worker: WorkerView) -> WorkerView:
    fingerprint = replace(worker.model.fingerprint, layout="another")
    return replace(worker, model=replace(worker.model, fingerprint=fingerprint))


def other_page_size(worker: WorkerView) -> WorkerView:
    fingerprint = replace(worker.model.fingerprint, page_size=64)
    return replace(worker, model=replace(worker.model, fingerprint=fingerprint))


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    workers = []
    for index in range(draw(st.integers(0, 6))):
        made = worker(
            f"w{index}",
            draw(st.sampled_from(Role)),
            draining=draw(st.booleans()),
            lease_expires_at=NOW + draw(st.sampled_from([-1, 0, 5])),
            num_assigned=draw(st.integers(0, 3)),
            load=WorkerLoad(
                num_running=draw(st.integers(0, 3)),
                num_waiting_tokens=draw(st.integers(0, 100)),
                pages_free=draw(st.integers(0, 4)),
            ),
        )
        workers.append(other_layout(made) if draw(st.booleans()) else made)
    return view(*workers)


@st.composite
def requests(draw: st.DrawFn) -> RouteRequest:
    excluded = draw(st.frozensets(st.integers(0, 5).map(lambda i: EngineId(f"w{i}-e1"))))
    return request(draw(st.integers(0, 20)), draw(st.integers(1, 100)), excluded)


@pytest.mark.parametrize("name", POLICIES)
@given(cluster=clusters(), request=requests())
def test_a_route_is_made_of_ready_compatible_workers_and_has_a_reason(
    name: str, cluster: ClusterView, request: RouteRequest
) -> None:
    policy: RoutingPolicy = make_policy(name, APART)
    if not cluster.ready(Role.DECODE):
        with pytest.raises(NoRoute):
            policy.route(request, cluster)
        return
    route = policy.route(request, cluster)

    assert route.reason
    assert bool(route.fallback) == (route.prefill is None)
    assert route == make_policy(name, APART).route(request, cluster)
    assert route.decode in cluster.ready(Role.DECODE)
    if route.prefill is not None:
        assert route.prefill in cluster.ready(Role.PREFILL)
        assert route.prefill.model.fingerprint == route.decode.model.fingerprint
    else:
        assert not any(w.model.fingerprint == route.decode.model.fingerprint for w in cluster.ready(Role.PREFILL)), (
            "a compatible prefill worker was left out"
        )


@pytest.mark.parametrize("name", POLICIES)
@given(cluster=clusters(), request=requests())
def test_an_excluded_worker_is_taken_only_when_no_other_is_left(
    name: str, cluster: ClusterView, request: RouteRequest
) -> None:
    if not cluster.ready(Role.DECODE):
        return
    route = make_policy(name, APART).route(request, cluster)

    if route.decode.engine_id in request.excluded:
        assert all(w.engine_id in request.excluded for w in cluster.ready(Role.DECODE))
    if route.prefill is not None and route.prefill.engine_id in request.excluded:
        fitting = [w for w in cluster.ready(Role.PREFILL) if w.model.fingerprint == route.decode.model.fingerprint]
        assert all(w.engine_id in request.excluded for w in fitting)
        assert "failed this sequence before" in route.reason


def test_a_pair_of_which_nobody_failed_is_preferred_to_one_whose_prefill_worker_did() -> None:
    cluster = view(
        worker("d0", Role.DECODE),
        worker("p0", Role.PREFILL),
        other_layout(worker("d1", Role.DECODE, num_assigned=9)),
        other_layout(worker("p1", Role.PREFILL, num_assigned=9)),
    )

    route = LeastLoaded().route(request(excluded=frozenset({EngineId("p0-e1")})), cluster)

    assert (route.decode.worker_id, route.prefill and route.prefill.worker_id) == ("d1", "p1")


def test_no_route_says_what_there_is() -> None:
    draining = worker("d0", Role.DECODE, draining=True)
    with pytest.raises(NoRoute, match="registered: 1 prefill, 1 decode; 1 of them draining"):
        RoundRobin().route(request(), view(worker("p0", Role.PREFILL), draining))
    with pytest.raises(NoRoute, match="no worker is registered"):
        RoundRobin().route(request(), view())


def test_without_prefill_workers_the_decode_worker_prefills_and_the_reason_says_so() -> None:
    route = LeastLoaded().route(request(), view(worker("d0", Role.DECODE)))

    assert route.prefill is None
    assert route.fallback == Fallback.NO_PREFILL_WORKER
    assert "d0 prefills: no prefill worker is ready" in route.reason


def test_without_a_compatible_prefill_worker_the_reason_names_what_differs() -> None:
    route = LeastLoaded().route(request(), view(worker("d0", Role.DECODE), other_layout(worker("p0", Role.PREFILL))))

    assert route.prefill is None
    assert route.fallback == Fallback.INCOMPATIBLE
    assert "layout differs" in route.reason


@pytest.mark.parametrize("name", POLICIES)
def test_workers_with_pages_of_another_size_are_paired(name: str) -> None:
    prefill = other_page_size(worker("p0", Role.PREFILL))
    assert make_policy(name, APART).route(request(), view(worker("d0", Role.DECODE), prefill)).prefill == prefill


def test_a_decode_worker_that_can_be_shipped_to_is_preferred() -> None:
    lonely = other_layout(worker("d0", Role.DECODE))
    busy = worker("d1", Role.DECODE, num_assigned=50)

    route = LeastLoaded().route(request(), view(lonely, busy, worker("p0", Role.PREFILL)))

    assert route.decode == busy


def test_round_robin_takes_workers_in_turn() -> None:
    cluster = view(
        *(worker(f"p{i}", Role.PREFILL) for i in range(2)), *(worker(f"d{i}", Role.DECODE) for i in range(3))
    )

    routes = [RoundRobin().route(request(ordinal), cluster) for ordinal in range(6)]

    assert [r.prefill.worker_id for r in routes if r.prefill] == ["p0", "p1"] * 3
    assert [r.decode.worker_id for r in routes] == ["d0", "d1", "d2"] * 2


def test_least_loaded_takes_the_prefill_worker_with_the_fewest_tokens_ahead() -> None:
    cluster = view(
        worker("p0", Role.PREFILL, load=WorkerLoad(num_waiting_tokens=500)),
        worker("p1", Role.PREFILL, load=WorkerLoad(num_waiting_tokens=10), num_assigned=3),
        worker("d0", Role.DECODE),
    )

    assert LeastLoaded().route(request(num_tokens=100), cluster).prefill == cluster.workers[2]
    assert LeastLoaded().route(request(num_tokens=200), cluster).prefill == cluster.workers[1]


def test_least_loaded_takes_a_decode_worker_whose_free_pages_hold_the_request() -> None:
    cluster = view(
        worker("d0", Role.DECODE, load=WorkerLoad(pages_free=1)),
        worker("d1", Role.DECODE, load=WorkerLoad(num_running=7, pages_free=50)),
    )

    assert LeastLoaded().route(request(num_tokens=15), cluster).decode.worker_id == "d0"
    assert LeastLoaded().route(request(num_tokens=16), cluster).decode.worker_id == "d1"


def test_least_loaded_counts_what_it_has_assigned_since_the_last_report() -> None:
    cluster = view(
        worker("d0", Role.DECODE, num_assigned=2),
        worker("d1", Role.DECODE, load=WorkerLoad(num_running=1, pages_free=100)),
    )

    assert LeastLoaded().route(request(), cluster).decode.worker_id == "d1"


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidConfig, match="round_robin, least_loaded"):
        make_policy("random")


def broken(prefill: WorkerView, decode: WorkerView) -> LinkView:
    return LinkView(
        from_worker=prefill.worker_id,
        from_cluster=prefill.cluster_id,
        to_worker=decode.worker_id,
        to_cluster=decode.cluster_id,
        heard_at=NOW,
        usable=False,
        reason="PeerLost: no answer",
    )


def with_broken(view: ClusterView, *pairs: tuple[WorkerView, WorkerView]) -> ClusterView:
    return replace(view, links={(p.worker_id, d.worker_id): broken(p, d) for p, d in pairs})


@pytest.mark.parametrize("policy", [make_policy(name, APART) for name in POLICIES], ids=list(POLICIES))
def test_a_pair_whose_link_is_broken_is_never_chosen(policy: RoutingPolicy) -> None:
    p0, p1 = worker("p0", Role.PREFILL), worker("p1", Role.PREFILL)
    d0, d1 = worker("d0", Role.DECODE), worker("d1", Role.DECODE)
    cluster = with_broken(view(p0, p1, d0, d1), (p0, d0), (p1, d1))

    routes = [policy.route(request(ordinal), cluster) for ordinal in range(8)]

    pairs = {(route.prefill.worker_id, route.decode.worker_id) for route in routes if route.prefill}
    assert len(routes) == 8
    assert pairs
    assert pairs <= {("p1", "d0"), ("p0", "d1")}


@pytest.mark.parametrize("policy", [make_policy(name, APART) for name in POLICIES], ids=list(POLICIES))
def test_a_decode_worker_that_nobody_can_ship_to_comes_last_and_says_why(policy: RoutingPolicy) -> None:
    p0, d0, d1 = worker("p0", Role.PREFILL), worker("d0", Role.DECODE), worker("d1", Role.DECODE)
    one_left = with_broken(view(p0, d0, d1), (p0, d0))
    none_left = with_broken(view(p0, d0), (p0, d0))

    assert {policy.route(request(ordinal), one_left).decode.worker_id for ordinal in range(4)} == {"d1"}
    alone = policy.route(request(), none_left)
    assert alone.prefill is None
    assert alone.fallback == Fallback.LINK_DOWN
    assert "no link from a prefill worker can be used (p0 to it: PeerLost: no answer)" in alone.reason


def knowing(num_tokens: int = 320, **num_pages: int) -> RouteRequest:
    """A request of whose leading pages each named worker caches so many."""
    slots = {EngineId(f"{name}-e1"): slot for slot, name in enumerate(num_pages)}
    levels = [PrefixLevel(count, 1 << slot) for slot, count in enumerate(num_pages.values()) if count]
    match = PrefixMatch(tuple(sorted(levels, key=lambda level: -level.num_pages)), slots)
    return replace(request(num_tokens=num_tokens), matches={16: match})


def busy(name: str, role: Role, **load: int) -> WorkerView:
    return worker(name, role, load=WorkerLoad(pages_free=100, **load))


def test_cache_aware_goes_where_the_first_token_costs_the_fewest_tokens() -> None:
    cluster = view(
        busy("p0", Role.PREFILL, num_waiting_tokens=100), busy("p1", Role.PREFILL), worker("d0", Role.DECODE)
    )
    assert CacheAware().route(knowing(p0=4), cluster).prefill == cluster.workers[2], "64 cached for 100 ahead"
    route = CacheAware().route(knowing(p0=8), cluster)
    assert route.prefill == cluster.workers[1], "128 cached for 100 ahead"
    assert "p0 caches 128 tokens and has 100 ahead" in route.reason


def test_cache_aware_ships_where_least_is_missing_unless_that_batch_is_crowded() -> None:
    def decode_of(num_running: int) -> str:
        cached = busy("d1", Role.DECODE, num_running=num_running)
        return CacheAware().route(knowing(d1=10), view(busy("d0", Role.DECODE, num_running=8), cached)).decode.worker_id

    assert (decode_of(12), decode_of(13)) == ("d1", "d0")


def test_cache_aware_prefers_room_to_a_cached_prefix() -> None:
    full = worker("d1", Role.DECODE, load=WorkerLoad(pages_free=20))
    assert CacheAware().route(knowing(d1=10), view(worker("d0", Role.DECODE), full)).decode.worker_id == "d0"


def test_the_last_token_is_always_computed() -> None:
    assert knowing(num_tokens=32, p0=2).cached_tokens(worker("p0", Role.PREFILL)) == 31
    assert knowing(p0=2).cached_tokens(other_page_size(worker("p0", Role.PREFILL))) == 0
