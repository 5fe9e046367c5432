"""Parts of the time to both tokens add up on every request of a fleet in which workers die and a link is cut."""

from __future__ import annotations

from dataclasses import fields

import pytest

from cluster.simulator.network import LinkSpec, RateChange
from cluster.simulator.scenario import Scenario, WorkerDeath
from cluster.simulator.workload import GAMMA, ArrivalPlan, empirical, from_lengths
from cluster.simulator.world import simulate
from core.latency_parts import TtftParts, TtstParts
from core.request import WorkerId
from tests.simulation.small_world import AWAY, HERE, away, here

_ROUNDING_S = 1e-6


def require_whole(parts: TtftParts | TtstParts, seconds: float) -> None:
    assert parts.total_s == pytest.approx(seconds, abs=_ROUNDING_S)
    assert all(getattr(parts, part.name) >= -_ROUNDING_S for part in fields(parts)), parts


def test_parts_are_whole_whatever_goes_wrong() -> None:
    changes = (RateChange(5.0, 0.3), RateChange(10.0, 0.0), RateChange(18.0, 1.0))
    deaths = (WorkerDeath(3.0, WorkerId("here/decode-1"), restart_s=4.0), WorkerDeath(12.0, WorkerId("here/prefill-0")))
    link = LinkSpec(AWAY, HERE, 3e6, 0.002, changes)
    scenario = Scenario((here(2, 3, latency_s=0.001), away(2)), (link,), deaths=deaths)
    lengths = empirical([(50, 5), (120, 8), (400, 3), (900, 12)])

    result = simulate(scenario, from_lengths(lengths, 80, ArrivalPlan(GAMMA, 5.0, burstiness=0.4), seed=2))

    timings = [record.timing for record in result.records if record.timing is not None]
    assert len(timings) > 60
    for timing in timings:
        assert timing.ttft_parts is not None
        require_whole(timing.ttft_parts, timing.ttft_s)
        if timing.ttst_parts is not None:
            assert all(getattr(timing.ttst_parts, part.name) >= -_ROUNDING_S for part in fields(timing.ttst_parts))
    firsts = [timing.ttft_parts for timing in timings if timing.ttft_parts is not None]
    seconds = [timing.ttst_parts for timing in timings if timing.ttst_parts is not None]
    assert any(parts.retries_s > 0 for parts in firsts), "a worker died under somebody's prompt"
    assert any(parts.prefill_queue_s > 0 for parts in firsts)
    assert any(parts.transfer_s > 0 for parts in seconds)
    assert any(parts.retries_s > 0 for parts in seconds) or any(parts.decode_queue_s > 0 for parts in seconds)
