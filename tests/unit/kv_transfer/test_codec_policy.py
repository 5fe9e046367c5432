"""Raw while raw fits, then the codec that loses least; no flapping; every change with its reason."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import VirtualClock
from core.request import ClusterId, WorkerId
from kv_transfer.codec import Codec, CodecUse
from kv_transfer.codec_policy import (
    ASSUMED_COSTS,
    COST_MEMORY_S,
    PROBE_S,
    STAY_S,
    CodecCost,
    CodecMeter,
    LinkCodecs,
    choose_codec,
)
from kv_transfer.transport import LayerPages, LinkStats, PeerIdentity

COSTS = {
    Codec.LOSSLESS: CodecCost(1300.0, 1000.0, 13.0),  # 100 bytes/s, 1.3
    Codec.INT8: CodecCost(2000.0, 1000.0, 2.0),  # 1,000 bytes/s, 2.0
    Codec.FP8: CodecCost(2000.0, 1000.0, 2.0),
}
ALL = tuple(Codec)
PEER = PeerIdentity(WorkerId("decode-0"), ClusterId("west"))
LAYER = LayerPages(page_bytes=256, dtype="bfloat16", block_bytes=64)
TICK_S = 0.25

codecs = st.sampled_from(ALL)
rates = st.floats(0, 1e12)


def choose(demand: float, goodput: float | None, current: Codec = Codec.RAW, allowed: tuple[Codec, ...] = ALL) -> Codec:
    return choose_codec(allowed, demand, goodput, COSTS, 1, current).codec


@given(st.sets(codecs), rates, rates, codecs)
def test_raw_whenever_raw_fits_with_a_reserve(allowed: set[Codec], goodput: float, share: float, now: Codec) -> None:
    demand = goodput * min(share / 1e12, 0.69)

    assert choose(demand, goodput, now, tuple(allowed)) is Codec.RAW


@given(st.sets(codecs), rates, st.none() | rates, codecs)
def test_choice_is_raw_or_allowed_has_a_reason_and_is_the_same_again(
    allowed: set[Codec], demand: float, goodput: float | None, current: Codec
) -> None:
    choice = choose_codec(allowed, demand, goodput, COSTS, 1, current)

    assert choice.codec in allowed | {Codec.RAW}
    assert choice.reason
    assert choice == choose_codec(sorted(allowed), demand, goodput, COSTS, 1, current)


@given(st.sets(codecs), st.floats(1, 1e6), st.floats(1, 1e6), codecs)
def test_choice_settles_on_constant_demand(allowed: set[Codec], demand: float, goodput: float, start: Codec) -> None:
    settled = choose(demand, goodput, choose(demand, goodput, start, tuple(allowed)), tuple(allowed))

    assert choose(demand, goodput, settled, tuple(allowed)) is settled


def test_raw_before_the_link_was_measured() -> None:
    assert choose(1e9, None) is Codec.RAW


def test_the_one_that_loses_least_among_those_that_fit() -> None:
    assert choose(60, 60) is Codec.LOSSLESS
    assert choose(100, 60) is Codec.INT8
    assert choose(100, 60, allowed=(Codec.RAW, Codec.FP8)) is Codec.FP8


def test_lossless_is_passed_over_when_the_cpu_cannot_pay() -> None:
    assert choose(110, 100) is Codec.INT8  # 130 bytes/s on the wire would do, 100 can be encoded
    assert choose_codec(ALL, 110, 100, COSTS, 2, Codec.RAW).codec is Codec.LOSSLESS


def test_what_carries_most_when_nothing_fits() -> None:
    assert choose(1e6, 60) is Codec.INT8
    assert choose(1e6, 60, Codec.FP8) is Codec.FP8  # no more is to be gained
    assert choose(1e6, 5000) is Codec.RAW  # the CPU is slower than the link


def test_way_back_needs_a_reserve() -> None:
    assert choose(95, 100) is Codec.INT8
    assert choose(80, 100) is Codec.RAW
    assert choose(80, 100, Codec.LOSSLESS) is Codec.LOSSLESS
    assert choose(80, 100, Codec.INT8) is Codec.INT8  # lossless could carry 100, which is no reserve
    assert choose(69, 100, Codec.INT8) is Codec.RAW


# ---- what is measured ----


def stats(**changes: object) -> LinkStats:
    return replace(LinkStats(PEER, "tcp", connections=1), **changes)  # type: ignore[arg-type]


def test_goodput_is_bytes_over_busy_seconds_once_there_are_enough() -> None:
    meter = CodecMeter()
    meter.tick(stats(bytes_sent=10, busy_s=0.1), 0.0)
    assert meter.goodput is None

    meter.tick(stats(bytes_sent=50, busy_s=0.5), 5.0)

    assert meter.goodput == pytest.approx(100)


def test_demand_is_what_is_made_and_what_waits() -> None:
    meter = CodecMeter()
    meter.tick(stats(), 0.0)
    for i in range(40):
        meter.queued(250)
        meter.tick(stats(bytes_queued=100), (i + 1) * TICK_S)

    assert meter.demand == pytest.approx(1000 + 50, rel=1e-3)


def test_costs_are_measured_and_forgotten() -> None:
    meter = CodecMeter()
    mib = 1 << 20

    meter.tick(stats(encoded=(CodecUse(Codec.LOSSLESS, 640 * mib, 320 * mib, 64.0),)), 1.0)

    cost = meter.costs(1.0)[Codec.LOSSLESS]
    assert cost.ratio == pytest.approx(2, rel=0.01)
    assert cost.encode_rate == pytest.approx(10 * mib, rel=0.01)
    assert meter.costs(1.0)[Codec.FP8] == ASSUMED_COSTS[Codec.FP8]
    assert meter.costs(2.0 + COST_MEMORY_S)[Codec.LOSSLESS] == ASSUMED_COSTS[Codec.LOSSLESS]


def test_counters_that_went_back_have_begun_anew() -> None:
    meter = CodecMeter()
    meter.tick(stats(bytes_sent=1000, busy_s=10.0), 0.0)

    meter.tick(stats(bytes_sent=100, busy_s=1.0), 1.0)

    assert meter.goodput == pytest.approx(100)


# ---- the owner of the choices ----


class Lab:
    """A link of ``capacity`` bytes/s that is asked for ``demand`` bytes/s: what is encoded well halves."""

    def __init__(self, *allowed: str) -> None:
        self.clock = VirtualClock()
        self.codecs = LinkCodecs(self.clock, lambda cluster: allowed if cluster == "west" else ("raw",))
        self.capacity = 100e6
        self.sent, self.busy, self.queue = 0.0, 0.0, 0.0
        self.raw, self.wire = 0, 0
        self.seen: list[Codec] = []

    def run(self, seconds: float, demand: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            num_bytes = int(demand * TICK_S) // 64 * 64
            codec = self.codecs.codec_for(PEER.worker_id, [LAYER], [num_bytes]) if num_bytes else Codec.RAW
            self.seen.append(codec)
            wire = num_bytes if codec is Codec.RAW else num_bytes // 2
            if codec is not Codec.RAW:
                self.raw, self.wire = self.raw + num_bytes, self.wire + wire
            self.queue += wire
            moved = min(self.queue, self.capacity * TICK_S)
            self.queue -= moved
            self.sent, self.busy = self.sent + moved, self.busy + moved / self.capacity
            self.clock.advance(TICK_S)
            use = (CodecUse(Codec.INT8, self.raw, self.wire, self.raw / 1e9),) if self.raw else ()
            self.codecs.tick(
                [stats(bytes_sent=int(self.sent), busy_s=self.busy, bytes_queued=int(self.queue), encoded=use)]
            )


def test_link_that_raw_fits_stays_raw() -> None:
    lab = Lab("raw", "int8")

    lab.run(120, 50e6)

    assert set(lab.seen) == {Codec.RAW}


def test_narrow_link_gets_a_codec_and_a_wide_one_raw_again(caplog: pytest.LogCaptureFixture) -> None:
    lab = Lab("raw", "int8")
    with caplog.at_level(logging.INFO):
        lab.run(3, 50e6)
        lab.capacity = 30e6
        lab.run(5, 50e6)
        assert lab.seen[-1] is Codec.INT8
        lab.capacity = 100e6
        lab.run(10, 50e6)

    assert lab.seen[-1] is Codec.RAW
    (state,) = lab.codecs.states()
    assert state.changes == {Codec.INT8: 1, Codec.RAW: 1}
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "codec int8 after raw",
        "codec raw after int8",
    ]
    assert "which fits" in caplog.records[1].message


def test_codec_that_stays_long_gives_raw_a_turn() -> None:
    lab = Lab("raw", "int8")

    lab.run(4 * PROBE_S, 150e6)

    changes = lab.codecs.states()[0].changes
    assert 3 <= changes[Codec.INT8] <= 5
    share = lab.seen.count(Codec.RAW) / len(lab.seen)
    assert share < (STAY_S + 1) / PROBE_S + 0.05


def test_only_raw_where_only_raw_is_allowed() -> None:
    lab = Lab("raw")

    lab.run(20, 1e9)

    assert set(lab.seen) == {Codec.RAW}
    assert lab.codecs.states()[0].choice.reason == "only raw is allowed"


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ([LAYER, replace(LAYER, dtype="float16")], [64]),
        ([LAYER, replace(LAYER, block_bytes=128)], [64]),
        ([replace(LAYER, dtype="float8_e4m3fn")], [64]),
        ([LAYER], [64, 16]),
    ],
)
def test_writes_that_do_not_suit_the_codec_go_raw(layers: list[LayerPages], sizes: list[int]) -> None:
    lab = Lab("raw", "int8")
    lab.run(5, 500e6)
    assert lab.codecs.codec_for(PEER.worker_id, [LAYER, LAYER], [64, 128]) is Codec.INT8

    assert lab.codecs.codec_for(PEER.worker_id, layers, sizes) is Codec.RAW


def test_worker_that_is_gone_is_forgotten_and_an_unknown_one_gets_raw() -> None:
    lab = Lab("raw", "int8")
    lab.run(5, 500e6)

    lab.codecs.tick([])

    assert lab.codecs.states() == ()
    assert lab.codecs.codec_for(PEER.worker_id, [LAYER], [64]) is Codec.RAW


def test_several_links_to_one_worker_are_one() -> None:
    lab = Lab("raw", "int8")
    mib = 1 << 20
    link = stats(bytes_sent=50, busy_s=1.0, bytes_queued=10, encoded=(CodecUse(Codec.INT8, mib, mib, 1.0),))

    lab.codecs.tick([link, link])

    (state,) = lab.codecs.states()
    assert state.goodput == pytest.approx(100)
    assert state.demand == pytest.approx(10)
