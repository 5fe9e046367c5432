"""Views and requests for tests of routing: made by hand with few words, or by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from cluster.cost_model import ComputeCost, CostView, LinearCost
from cluster.prefix_index import PrefixIndex
from cluster.routing_policy import RouteRequest
from cluster.view import ClusterView, LinkView, ModelInfo, Offload, WorkerLoad, WorkerView
from core.fingerprint import CacheFingerprint
from core.link import LinkEstimate
from core.prefix_hash import page_hashes, page_key
from core.request import ClusterId, EngineId, RequestId, Role, WorkerId

NOW = 100.0
PAGE = 16
KV_BYTES = 1000
MODEL = ModelInfo(
    architecture="Fake",
    fingerprint=CacheFingerprint(model="m", revision="r", dtype="float32", page_size=PAGE, layout="l"),
    max_model_len=100_000,
    vocab_size=100,
    eos_token_ids=(0,),
    kv_bytes_per_token=KV_BYTES,
    num_layers=10,
)
# A prompt token takes 1 ms, a decode step 10 ms and 1 ms for each sequence; a link carries 100,000 tokens' K/V/s.
COST = ComputeCost(LinearCost((0.0, 1e-3, 0.0)), LinearCost((1e-2, 1e-3, 0.0)), 512)
LINK = LinearCost((0.0, 1e-8))
HOME, AWAY, FAR = ClusterId("home"), ClusterId("away"), ClusterId("far")


def worker(name: str, cluster: ClusterId = HOME, pages: int = 10_000, **changes: object) -> WorkerView:
    """``p...`` prefills, ``d...`` decodes; nothing runs there. ``changes``: of the view, or of its load."""
    view = WorkerView(
        worker_id=WorkerId(name),
        engine_id=EngineId(f"{name}-e1"),
        cluster_id=cluster,
        address=f"{name}:1",
        role=Role.PREFILL if name.startswith("p") else Role.DECODE,
        draining=False,
        lease_expires_at=NOW + 5,
        model=MODEL,
        transport="tcp",
        pages_total=pages,
        load=WorkerLoad(pages_free=pages),
        profile="gpu",
    )
    of_load = {key: value for key, value in changes.items() if key in WorkerLoad.__dataclass_fields__}
    of_view = {key: value for key, value in changes.items() if key not in of_load}
    return replace(view, load=replace(view.load, **of_load), **of_view)  # type: ignore[arg-type]


def view(*workers: WorkerView, offload: Offload | None = None, costs: CostView | None = None) -> ClusterView:
    return ClusterView(
        at=NOW,
        workers=tuple(sorted(workers, key=lambda w: w.worker_id)),
        costs=costs or CostView({"gpu": COST}, {(a, b): LINK for a in (HOME, AWAY, FAR) for b in (HOME, AWAY, FAR)}),
        offload=offload or Offload(),
    )


def link(source: WorkerView, target: WorkerView, rate: float | None = None, reason: str = "") -> LinkView:
    """One that carries ``rate`` bytes/s; with a reason it may not be used."""
    estimate = None if rate is None else LinkEstimate(target.worker_id, target.cluster_id, goodput=rate)
    return LinkView(
        source.worker_id,
        source.cluster_id,
        target.worker_id,
        target.cluster_id,
        NOW,
        estimate,
        usable=not reason,
        reason=reason,
    )


def with_links(cluster: ClusterView, *links: LinkView) -> ClusterView:
    return replace(cluster, links={(made.from_worker, made.to_worker): made for made in links})


def request(
    num_tokens: int = 1000, cached: Mapping[str, int] | None = None, num_output: int = 100, **changes: object
) -> RouteRequest:
    """A prompt of whose tokens each named worker caches so many."""
    made = RouteRequest(RequestId("r"), num_tokens, 0, num_output=num_output, mean_output=float(num_output))
    names = {EngineId(f"{name}-e1"): tokens for name, tokens in (cached or {}).items()}
    return replace(made, **({"matches": matches(num_tokens, names, (PAGE,))} | changes))  # type: ignore[arg-type]


def matches(num_tokens: int, cached: Mapping[EngineId, int], page_sizes: Sequence[int]) -> Mapping[int, object]:
    """page size |-> what a prefix index answers if each engine caches so many tokens."""
    index = PrefixIndex()
    hashes = {page_size: page_hashes(range(num_tokens), page_size) for page_size in page_sizes}
    for engine_id, tokens in cached.items():
        index.add_worker(engine_id)
        for page_size in page_sizes:
            index.stored(engine_id, map(page_key, hashes[page_size][: tokens // page_size]))
    return {page_size: index.match(hashes[page_size]) for page_size in page_sizes}


# ---- made up ----

SECONDS = st.sampled_from([0.0, 1e-6, 1e-4, 1e-2])
COSTS = st.builds(
    ComputeCost,
    st.tuples(SECONDS, SECONDS, st.sampled_from([0.0, 1e-9, 1e-7])).map(LinearCost),
    st.tuples(SECONDS, SECONDS, st.sampled_from([0.0, 1e-8, 1e-6])).map(LinearCost),
    st.sampled_from([64, 2048, math.inf]),
)
OFFLOADS = st.builds(Offload, st.sampled_from([0.0, 50.0, 200.0, 1000.0, math.inf]), st.booleans())


MODELS = st.sampled_from(
    [MODEL, MODEL, MODEL]
    + [
        replace(MODEL, fingerprint=replace(MODEL.fingerprint, **{key: value}))
        for key, value in (("layout", "m"), ("page_size", 64))
    ]
)
STATES: list[Mapping[str, object]] = [{}, {}, {}, {"draining": True}, {"lease_expires_at": NOW}]
LOADS: list[Mapping[str, int]] = [
    {},
    {"num_running": 8, "pages_free": 9_000},
    {"num_running": 1, "num_waiting": 3, "num_waiting_tokens": 3000, "pages_free": 20},
    {"num_running": 3, "pages_free": 0},
    {"pages_free": 3, "num_announced": 2, "num_announced_tokens": 30},
    {"num_unreported": 2, "unreported_tokens": 500, "unreported_kv_tokens": 700},
    {"pages_free": 9_000, "pages_cached": 8_990, "prompt_tokens": 10_000, "cached_tokens": 6_000},
]


@st.composite
def workers(draw: st.DrawFn, index: int) -> WorkerView:
    role, home = draw(st.sampled_from([("p", HOME), ("p", AWAY), ("p", FAR), ("d", HOME), ("d", HOME), ("d", AWAY)]))
    changes = {**draw(st.sampled_from(STATES)), **draw(st.sampled_from(LOADS))}
    profile = draw(st.sampled_from(["gpu", "slow", "never heard of"]))
    return worker(f"{role}{index}", home, model=draw(MODELS), profile=profile, **changes)


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    made = [draw(workers(index)) for index in range(draw(st.integers(0, 7)))]
    pairs = [(a, b) for a in made for b in made if a is not b]
    known = st.tuples(st.sampled_from(pairs), st.sampled_from([(None, ""), (1e6, ""), (1e9, ""), (None, "down")]))
    links = [link(*ends, *says) for ends, says in (draw(st.lists(known, max_size=8)) if pairs else ())]
    profiles = {"gpu": draw(COSTS), "slow": draw(COSTS)}
    transfers = {(HOME, HOME): LINK, (AWAY, HOME): LinearCost((0.01, 1e-7))}
    return with_links(view(*made, offload=draw(OFFLOADS), costs=CostView(profiles, transfers)), *links)


@st.composite
def requests(draw: st.DrawFn, cluster: ClusterView) -> RouteRequest:
    num_tokens = draw(st.sampled_from([1, 15, 40, 200, 1000]))
    cached = {w.engine_id: draw(st.sampled_from([0, 0, 16, 64, 160, num_tokens])) for w in cluster.workers}
    engines = [w.engine_id for w in cluster.workers]
    return request(
        num_tokens,
        num_output=draw(st.sampled_from([1, 2, 100, 5000])),
        matches=matches(num_tokens, cached, (PAGE, 64)),
        excluded=draw(st.frozensets(st.sampled_from(engines), max_size=2)) if engines else frozenset(),
    )
