"""The PrfaaS paper's case study as a simulation: its document, its lengths, ways of planning side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from cluster.config import PLANNER_DUAL, PLANNER_OFF, PLANNER_STATIC, PlannerConfig
from cluster.plan_document import PlanDocument, PlanOptions, load_plan
from cluster.planned_fleet import Demand, demand_of, plan_fleet
from cluster.simulator.network import RateChange
from cluster.simulator.planned_scenario import ScenarioOptions, scenario_of
from cluster.simulator.result_report import result_as_dict
from cluster.simulator.scenario import Scenario
from cluster.simulator.workload import GAMMA, POISSON, ArrivalPlan, Workload, from_lengths, from_trace, log_normal
from cluster.simulator.world import SimulationResult, simulate
from cluster.throughput_model import Fleet
from cluster.workload_traces import TraceRequest, read_trace
from core.request import NO_SLO, Slo

DOCUMENT = Path(__file__).resolve().parent.parent / "deploy/examples/prfaas-paper.yaml"
LENGTHS = log_normal(9.90, 1.00, 128, 131072, 1024)  # PAPERS.md A.11
TTFT_SLO_S = 10.0  # the paper has none; four times the mean idle TTFT
TPOT_SLO_S = 0.040

# How prompts are divided: the planner, nothing or everything offloaded, or the paper's threshold whatever happens.
PLANNERS: Mapping[str, PlannerConfig] = {
    "adaptive": PlannerConfig(mode=PLANNER_DUAL),
    "local": PlannerConfig(mode=PLANNER_OFF),
    "remote": PlannerConfig(mode=PLANNER_STATIC, threshold_tokens=0),
    "static": PlannerConfig(mode=PLANNER_STATIC, threshold_tokens=19_400),
}


@dataclass(frozen=True)
class CaseStudy:
    """The case study with a link of ``gbps``, which changes as ``fluctuation`` says."""

    gbps: float = 100.0
    fluctuation: tuple[RateChange, ...] = ()

    def fleet(self) -> Fleet:
        """As the throughput model takes it."""
        document, demand = _planned(self.gbps)
        return plan_fleet(document.config, document.catalogue, demand).fleet

    def scenario(self, planner: PlannerConfig, roles: tuple[int, int] | None = (3, 5)) -> Scenario:
        """The fleet; ``roles``: prefill and decode workers of the serving cluster, None: the best for the link."""
        document, demand = _planned(self.gbps)
        options = ScenarioOptions(fluctuation=self.fluctuation)
        scenario = scenario_of(document.config, document.catalogue, demand, None, options)
        clusters = tuple(
            replace(cluster, num_prefill=roles[0], num_decode=roles[1])
            if roles is not None and cluster.cluster_id == scenario.home
            else cluster
            for cluster in scenario.clusters
        )
        return replace(scenario, clusters=clusters, planner=planner, tpot_slo_s=TPOT_SLO_S)


@cache
def _planned(gbps: float) -> tuple[PlanDocument, Demand]:
    """The planning document with that link, and its demand."""
    document = load_plan(DOCUMENT, PlanOptions((f"links.wan.gbps={gbps:g}",)))
    return document, demand_of(document.config.workload)


def requests(count: int, rate_rps: float, *, burstiness: float = 1.0, seed: int = 0, slo: Slo = NO_SLO) -> Workload:
    """Prompts of the case study's lengths."""
    process = POISSON if burstiness == 1.0 else GAMMA
    return from_lengths(LENGTHS, count, ArrivalPlan(process, rate_rps, burstiness), seed=seed, slo=slo)


def at_instants_of(trace: Path, count: int, rate_rps: float, *, seed: int = 0, slo: Slo = NO_SLO) -> Workload:
    """Likewise, at the instants of the trace's first ``count`` requests, stretched to a rate."""
    random = Random(seed)
    drawn = []
    for recorded in islice(read_trace(trace), count):
        tokens, output = LENGTHS(random)
        drawn.append(TraceRequest(tokens, output, recorded.arrival_s))
    return from_trace(drawn, ArrivalPlan(rate_rps=rate_rps), seed=seed, slo=slo)


def play(scenario: Scenario, workload: Workload) -> tuple[SimulationResult, dict[str, Any]]:
    """The result, and what a report tells of it."""
    result = simulate(scenario, workload)
    return result, result_as_dict(result, TTFT_SLO_S, TPOT_SLO_S)
