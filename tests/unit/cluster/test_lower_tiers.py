"""Lower tiers of prefix caches as gateways know them: told, indexed, and counted in routes with their seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.page_events import PageEventLog
from cluster.prefix_index import PrefixIndex
from cluster.prfaas_routing import PrfaasRouting
from cluster.routing_policy import RouteRequest, RoutingSettings
from cluster.view import Route, WorkerView
from core.cache_tiers import LOWER_TIERS, Tier, TierState
from core.errors import ProtocolViolation
from core.prefix_hash import PageEvents, PageHash, page_hashes, page_key
from core.request import EngineId
from protos import wire
from protos import worker_pb2 as pb
from tests.unit.cluster.routing_views import AWAY, KV_BYTES, PAGE, link, request, view, with_links, worker

HASHES = page_hashes(range(12), 1)
KEYS = [page_key(name) for name in HASHES]
A, B = EngineId("a"), EngineId("b")
APART = RoutingSettings(colocate="never")


class Reader:
    """A gateway's end of one worker's log, and its index."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.index = PrefixIndex()
        self.index.add_worker(A, LOWER_TIERS)
        self.index.add_worker(B)

    def read(self, log: PageEventLog) -> None:
        events = log.since(self.number)
        if events is None:
            return
        events = wire.page_events_from_message(wire.page_events_to_message(events))
        assert events.snapshot or events.after == self.number, "a gap"
        self.index.apply(A, events)
        self.number = events.number


# Depths of the device, of it and host memory, of those and the disk: that is how a prefix lies in tiers.
DEPTHS = st.tuples(*[st.integers(0, len(HASHES))] * 3).map(lambda depths: tuple(sorted(depths)))


@given(steps=st.lists(st.tuples(DEPTHS, st.booleans(), st.booleans()), max_size=12), max_changes=st.integers(0, 20))
def test_every_gateway_knows_how_deep_each_tier_goes_however_seldom_it_reads(
    steps: list[tuple[tuple[int, ...], bool, bool]], max_changes: int
) -> None:
    log, readers = PageEventLog(max_changes), (Reader(), Reader())
    for reader in readers:
        reader.index.stored(B, KEYS[:5])
    tiers: list[Tier | None] = [None] * len(HASHES)
    for depths, *reads in [*steps, ((3, 5, 8), True, True)]:
        now = [next((t for t, d in zip(Tier, depths, strict=True) if page < d), None) for page in range(len(HASHES))]
        moved: dict[Tier | None, list[PageHash]] = {}
        for page, (before, after) in enumerate(zip(tiers, now, strict=True)):
            if before is not after:
                moved.setdefault(after, []).append(HASHES[page])
        log.record(moved.pop(Tier.DEVICE, []), moved.pop(None, []), {t: n for t, n in moved.items() if t is not None})
        tiers = now
        for reader, reads_now in zip(readers, reads, strict=True):
            if not reads_now:
                continue
            reader.read(log)
            match = reader.index.match(HASHES)
            assert (match.pages_on(A), *(match.pages_within(A, tier) for tier in LOWER_TIERS)) == depths
            assert (match.pages_on(B), match.pages_within(B, Tier.HOST)) == (5, 0)


def test_what_a_lost_worker_held_below_is_swept_out() -> None:
    index = PrefixIndex()
    for _ in range(3):
        index.add_worker(A, LOWER_TIERS)
        index.apply(A, PageEvents(1, snapshot=True, stored=tuple(KEYS[:4])))
        index.lowered(A, Tier.DISK, KEYS[4:])
        assert index.match(HASHES).pages_within(A, Tier.DISK) == 12
        index.remove_worker(A)
        while index.sweep():
            pass
        assert index.num_keys == 0
    assert index._num_slots <= 6, "slots are used again"


def test_a_tier_that_nobody_described_is_a_violation() -> None:
    index = PrefixIndex()
    index.add_worker(A)
    with pytest.raises(ProtocolViolation, match="did not describe"):
        index.lowered(A, Tier.HOST, KEYS)
    with pytest.raises(ProtocolViolation, match="host, disk"):
        wire.page_events_from_message(pb.PageEvents(lower=[pb.TierPages(tier="tape")]))


# ---- routes ----


def tiered(name: str, host_rate: float, disk_rate: float = 0.0, queued_bytes: int = 0) -> WorkerView:
    """A worker that loads so many tokens/s from host memory and from disk."""
    host = TierState(Tier.HOST, 1000, 0, host_rate * KV_BYTES, 0.01, queued_bytes)
    disk = TierState(Tier.DISK, 1000, 0, disk_rate * KV_BYTES, 0.02)
    return worker(name, tiers=(host, disk))


def asked(device: dict[str, int], lower: dict[str, tuple[int, int]], num_tokens: int = 1000) -> RouteRequest:
    """A prompt of which each worker has so many tokens on its device, and up to there in host memory and on disk."""
    index, hashes = PrefixIndex(), page_hashes(range(num_tokens), PAGE)
    keys = [page_key(name) for name in hashes]
    for name in {*device, *lower}:
        engine_id = EngineId(f"{name}-e1")
        index.add_worker(engine_id, LOWER_TIERS if name in lower else ())
        held = [device.get(name, 0), *lower.get(name, ())]
        first = 0
        for tier, tokens in zip(Tier, held, strict=False):
            pages = keys[first : tokens // PAGE]
            first = max(first, tokens // PAGE)
            if tier is Tier.DEVICE:
                index.stored(engine_id, pages)
            else:
                index.lowered(engine_id, tier, pages)
    return replace(request(num_tokens), matches={PAGE: index.match(hashes)})


def route(asked: RouteRequest, *workers: WorkerView) -> Route:
    return PrfaasRouting(APART).route(asked, view(*workers))


def test_a_prefix_in_host_memory_counts_with_the_seconds_of_its_load() -> None:
    # 960 tokens are loaded at 10,000/s after 10 ms, 40 are computed in 1 ms each.
    chosen = route(asked({}, {"p1": (960, 960)}), worker("p0"), tiered("p1", 10_000), worker("d0"))
    assert chosen.prefill is not None
    assert chosen.prefill.worker_id == "p1"
    assert chosen.expected is not None
    assert chosen.expected.ttft_s == pytest.approx(0.01 + 0.096 + 0.04)
    assert "0.106 s to load 960 tokens" in chosen.reason


def test_and_on_disk_with_those_of_both_loads() -> None:
    chosen = route(asked({"p1": 160}, {"p1": (480, 960)}), tiered("p1", 10_000, 5_000), worker("d0"))
    assert chosen.expected is not None
    # From host memory 320 tokens, from disk 480 at 5,000/s, which go through host memory as well.
    assert chosen.expected.ttft_s == pytest.approx((0.01 + 0.032) + (0.02 + 0.096) + (0.01 + 0.048) + 0.04)


@pytest.mark.parametrize("slow", [{"host_rate": 900.0}, {"host_rate": 10_000.0, "queued_bytes": 10**7}])
def test_a_load_that_is_slower_than_computing_counts_for_nothing(slow: dict[str, float]) -> None:
    chosen = route(asked({}, {"p1": (960, 960)}), worker("p0"), tiered("p1", **slow), worker("d0"))  # type: ignore[arg-type]
    assert chosen.prefill is not None
    assert chosen.prefill.worker_id == "p0"
    assert "lower tiers" not in chosen.reason


def test_a_tier_whose_speed_is_not_known_counts_for_nothing() -> None:
    chosen = route(asked({}, {"p1": (960, 960)}), worker("p0"), worker("p1"), worker("d0"))
    assert chosen.expected is not None
    assert chosen.expected.ttft_s == pytest.approx(1.0)


def test_peers_fetch_from_devices_only() -> None:
    p0, p1, d0 = worker("p0"), tiered("p1", 10_000), worker("d0")
    busy = replace(p1, load=replace(p1.load, num_waiting=9, num_waiting_tokens=100_000))
    cluster = with_links(view(p0, busy, d0), link(busy, p0, 1e9))
    below = PrfaasRouting(APART).route(asked({}, {"p1": (960, 960)}), cluster)
    above = PrfaasRouting(APART).route(asked({"p1": 960}, {"p1": (960, 960)}), cluster)
    assert (below.prefill, below.pull) == (p0, None)
    assert above.pull is not None
    assert above.pull.source.worker_id == "p1"


def test_a_worker_that_can_load_does_not_send_its_prompt_to_another_cluster() -> None:
    cached = asked({}, {"p1": (960, 960)})
    cluster = view(tiered("p1", 10_000), worker("p9", AWAY), worker("d0"))
    far = replace(cluster, offload=replace(cluster.offload, threshold_tokens=100.0))
    kept = PrfaasRouting(APART).route(cached, far)
    sent = PrfaasRouting(APART).route(request(1000), far)
    assert kept.prefill is not None
    assert sent.prefill is not None
    assert (kept.prefill.worker_id, sent.prefill.worker_id) == ("p1", "p9")
