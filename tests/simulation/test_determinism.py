"""Equal seeds give equal results, byte for byte, whatever the process's hash seed; of everything that may go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster.config import AdmissionConfig, PlannerConfig
from cluster.simulator.network import LinkSpec, RateChange
from cluster.simulator.result_report import result_as_json
from cluster.simulator.scenario import Scenario, WorkerDeath
from cluster.simulator.workload import GAMMA, ArrivalPlan, empirical, from_lengths
from cluster.simulator.world import simulate
from core.request import WorkerId
from tests.simulation.small_world import AWAY, HERE, away, here

ROOT = Path(__file__).resolve().parents[2]


def busy_minute(seed: int) -> str:
    """Two clusters, a link that narrows, is cut and comes back, workers that die, a planner that learns costs."""
    changes = (RateChange(5.0, 0.3), RateChange(10.0, 0.0), RateChange(18.0, 1.0))
    scenario = Scenario(
        (here(2, 3, latency_s=0.001), away(2)),
        (LinkSpec(AWAY, HERE, 3e6, 0.002, changes),),
        admission=AdmissionConfig(ttft_slo_s=5.0, on_miss="serve"),
        planner=PlannerConfig(),
        learn_costs=True,
        deaths=(
            WorkerDeath(3.0, WorkerId("here/decode-1"), restart_s=4.0),
            WorkerDeath(12.0, WorkerId("here/prefill-0")),
        ),
    )
    lengths = empirical([(50, 5), (120, 8), (400, 3), (900, 12)])
    workload = from_lengths(lengths, 60, ArrivalPlan(GAMMA, 5.0, burstiness=0.4), seed=seed)
    result = simulate(scenario, workload)
    return result_as_json(result, 1.0, 0.2) + "\n".join(map(repr, result.records))


def test_equal_seeds_give_equal_bytes_in_any_process() -> None:
    script = "from tests.simulation.test_determinism import busy_minute; import sys; sys.stdout.write(busy_minute(1))"

    def told(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    first = told("1")

    assert first == told("2")
    assert len(first) > 5_000


def test_another_seed_is_another_world() -> None:
    assert busy_minute(1) != busy_minute(2)


def test_every_request_ends_whatever_happens() -> None:
    assert '"num_requests": 60,\n "num_finished": 60' in busy_minute(3)
