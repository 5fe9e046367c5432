"""A simulated pool follows the load, by the real planner and scaler: hours of machine time in a second."""

from __future__ import annotations

from cluster.config import AdmissionConfig, PlannerConfig, PoolConfig, RouterConfig
from cluster.scaling_policy import ScalingSettings
from cluster.simulator.records import OK
from cluster.simulator.scenario import Scenario
from cluster.simulator.workload import Workload
from cluster.simulator.world import SimulationResult, simulate
from core.request import Role
from tests.simulation.small_world import here, kind, prompt

START_S = 20.0


def play(pools: dict[Role, PoolConfig]) -> SimulationResult:
    """Decode workers of 40 tokens/s; 1 request of 20 tokens a second, but 4 from second 20 to 80."""
    starts = [float(at) for at in range(20)] + [20 + at / 4 for at in range(240)] + [80.0 + at for at in range(140)]
    requests = [prompt(number, at, tokens=50, output_tokens=20) for number, at in enumerate(starts)]
    scaling = ScalingSettings(upscale_delay_s=5, downscale_delay_s=40, conversion_wait_s=10)
    scenario = Scenario(
        (here(1, 1, of=kind(max_batch_size=4)),),
        router=RouterConfig(max_inflight=10_000),
        admission=AdmissionConfig(max_queued=10_000, max_wait_s=1000),
        planner=PlannerConfig(interval_s=2.0, demand_window_s=10.0, scaling=scaling),
        pools=pools,
        start_s=START_S,
    )
    return simulate(scenario, Workload(tuple(requests)))


def test_a_surge_is_served_by_more_workers_which_go_again_and_nothing_is_lost() -> None:
    elastic = play({Role.DECODE: PoolConfig(max_replicas=4)})

    assert {record.outcome for record in elastic.records} == {OK}
    assert elastic.num_resumes == 0
    sizes = [sample.clusters[0].num_decode for sample in elastic.samples]
    # 4 requests/s of 20 tokens are 80 tokens/s: 2 workers, 3 at 85 %
    assert (sizes[0], max(sizes), sizes[-1]) == (1, 3, 1)
    first = next(at for at, size in enumerate(sizes) if size > 1)
    assert 20 + START_S < first < 20 + START_S + 25
    last = [record.ttft_s or 0.0 for record in elastic.records if record.arrived_at > 160]
    assert max(last) < 1.0
